"""The ten lines of the README: the client from another service.

Owns nothing but the example.

    python examples/python/client.py
"""

# --- readme
from rillgate import Client

with Client("127.0.0.1:50051") as client:
    answer = client.chat([{"role": "user", "content": "What is 4821 + 1397?"}], timeout_s=30)
    print(answer.text, answer.finish_reason, answer.usage.completion_tokens)

    with client.stream([{"role": "user", "content": "Reverse the word stream."}]) as stream:
        for chunk in stream:
            print(chunk.text, end="", flush=True)
# --- readme
