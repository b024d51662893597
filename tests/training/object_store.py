"""An S3 server on this machine (moto's, in a thread), for tests of stores that are no local folder."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

BUCKET = "runs"


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The address of a server with an empty bucket; in the block s3fs uses it, here and in child processes."""
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    ours = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    s3fs.S3FileSystem.clear_instance_cache()  # an earlier server had another port
    try:
        s3fs.S3FileSystem().makedirs(BUCKET, exist_ok=True)  # servers of one process share what they hold
        yield address
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
