"""The service: a bundle's models over the Open Inference Protocol (HTTP and gRPC) and plain JSON. Extra `serve`."""
