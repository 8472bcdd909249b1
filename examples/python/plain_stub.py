"""Calls Rillgate with nothing but the generated stub: grpcio, protobuf and the .proto file.

Owns the shortest complete caller that does not use `rillgate.Client`. The stub comes with the base
package as `rillgate_proto`; a service that builds its own copies `protos/` and runs
`python -m grpc_tools.protoc -I protos --python_out=. --grpc_python_out=. \
protos/rillgate_proto/v1/inference.proto`.

    python examples/python/plain_stub.py "What is 4821 + 1397?" [HOST:PORT]
"""

import sys

import grpc

from rillgate_proto.v1 import inference_pb2, inference_pb2_grpc


def main(question: str, target: str = "127.0.0.1:50051") -> None:
    """Stream one answer to stdout, reasoning first."""
    request = inference_pb2.GenerateRequest(
        chat=inference_pb2.ChatMessages(messages=[{"role": "user", "content": question}]),
        stopping=inference_pb2.StoppingParams(max_tokens=512),
    )
    with grpc.insecure_channel(target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        separator = ""  # between reasoning and answer
        try:
            for response in stub.Generate(request, timeout=60):
                for output in response.outputs:
                    if output.reasoning_text:
                        print(output.reasoning_text, end="", flush=True)
                        separator = "\n\n"
                    if output.text:
                        print(separator + output.text, end="", flush=True)
                        separator = ""
                for finished in response.finished:
                    reason = inference_pb2.FinishReason.Name(finished.reason)
                    print(f"\n[{reason}, {finished.usage.completion_tokens} tokens]")
        except grpc.RpcError as error:
            sys.exit(f"{error.code().name}: {error.details()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
