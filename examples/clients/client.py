"""Ask a running `mi2rage-rt serve` or Triton by the Open Inference Protocol, over HTTP or gRPC.

    pip install 'tritonclient[http,grpc]'
    python client.py relation 'Tim Cook leads Apple' --head 0:2 --tail 3:4 --image photo.jpg
    python client.py caption photo.jpg
    python client.py image 'a red car by the sea' --seed 7 --out car.png
    python client.py --grpc --url localhost:8001 caption photo.jpg

`--head` and `--tail` count words. `mi2rage-rt serve` listens on 8080 (HTTP) and 8081 (gRPC), Triton on 8000 and 8001.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient.utils import InferenceServerException


class Client:
    """One connection; both protocols have the same calls."""

    def __init__(self, url: str, use_grpc: bool, token: str | None = None) -> None:
        self._module: Any = importlib.import_module(f"tritonclient.{'grpc' if use_grpc else 'http'}")
        self._client = self._module.InferenceServerClient(url)
        self._headers = {"authorization": f"Bearer {token}"} if token else {}

    def ask(
        self, model: str, inputs: dict[str, tuple[str, np.ndarray]], parameters: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The outputs of one row by name; BYTES come as bytes."""
        sent = []
        for name, (datatype, array) in inputs.items():
            tensor = self._module.InferInput(name, list(array.shape), datatype)
            tensor.set_data_from_numpy(array)
            sent.append(tensor)
        # As texts: neither protocol's parameters know fractions everywhere.
        given = {name: str(value) for name, value in (parameters or {}).items() if value is not None}
        answer = self._client.infer(model, sent, parameters=given or None, headers=self._headers)
        described = self._client.get_model_metadata(model, headers=self._headers)
        outputs = described["outputs"] if isinstance(described, dict) else described.outputs
        names = [output["name"] if isinstance(output, dict) else output.name for output in outputs]
        return {name: answer.as_numpy(name)[0].tolist() for name in names}


def of_bytes(value: bytes) -> tuple[str, np.ndarray]:
    """One row of a BYTES tensor."""
    return "BYTES", np.array([[value]], dtype=object)


def span(text: str) -> tuple[str, np.ndarray]:
    """`0:2` as one row of a mention's tensor."""
    start, end = text.split(":")
    return "INT32", np.array([[int(start), int(end)]], dtype=np.int32)


def seed_row(seed: int) -> tuple[str, np.ndarray]:
    """One row of a seed's tensor."""
    return "UINT64", np.array([[seed]], dtype=np.uint64)


def relation(client: Client, arguments: argparse.Namespace) -> str:
    inputs = {
        "tokens": of_bytes(json.dumps(arguments.sentence.split()).encode()),
        "head": arguments.head,
        "tail": arguments.tail,
    }
    if arguments.image is not None:
        inputs["image"] = of_bytes(arguments.image.read_bytes())
    answer = client.ask("classifier", inputs)
    return f"{answer['relation'][0].decode()}  {answer['probability'][0]:.3f}"


def caption(client: Client, arguments: argparse.Namespace) -> str:
    inputs = {"image": of_bytes(arguments.image.read_bytes()), "prefix": of_bytes(arguments.prefix.encode())}
    if arguments.seed is not None:
        inputs["seed"] = seed_row(arguments.seed)
    return str(client.ask("captioner", inputs)["caption"][0].decode())


def image(client: Client, arguments: argparse.Namespace) -> str:
    inputs = {"prompt": of_bytes(arguments.prompt.encode()), "seed": seed_row(arguments.seed)}
    answer = client.ask("generator", inputs, {"steps": arguments.steps, "guidance_scale": arguments.guidance})
    arguments.out.write_bytes(answer["image"][0])
    return str(arguments.out)


def arguments_from(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="localhost:8080", help="host and port")
    parser.add_argument("--grpc", action="store_true", help="gRPC instead of HTTP")
    parser.add_argument("--token-file", type=Path, help="file with the server's bearer token")
    commands = parser.add_subparsers(required=True)
    ask = commands.add_parser("relation")
    ask.add_argument("sentence")
    ask.add_argument("--head", type=span, required=True, help="words of the head mention, e.g. 0:2")
    ask.add_argument("--tail", type=span, required=True)
    ask.add_argument("--image", type=Path)
    ask.set_defaults(run=relation)
    ask = commands.add_parser("caption")
    ask.add_argument("image", type=Path)
    ask.add_argument("--prefix", default="")
    ask.add_argument("--seed", type=int, help="draws the caption; without it the most probable one")
    ask.set_defaults(run=caption)
    ask = commands.add_parser("image")
    ask.add_argument("prompt")
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--steps", type=int)
    ask.add_argument("--guidance", type=float)
    ask.add_argument("--out", type=Path, default=Path("image.png"))
    ask.set_defaults(run=image)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    arguments = arguments_from(words)
    token = arguments.token_file.read_text().strip() if arguments.token_file else None
    try:
        sys.stdout.write(arguments.run(Client(arguments.url, arguments.grpc, token), arguments) + "\n")
    except (InferenceServerException, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
