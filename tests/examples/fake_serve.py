"""Stands for `rillgate serve` in the demo's test: gives the replies named on its command line.

python fake_serve.py TEXT … --listen 127.0.0.1:PORT
"""

import argparse
import signal

from rillgate.testing import FakeReply, FakeServer


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--listen", required=True)
    args = parser.parse_args()
    # Blocked before any thread exists, so that sigwait alone takes it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with FakeServer(port=int(args.listen.rpartition(":")[2])) as server:
        server.reply(*(FakeReply(text, reasoning_text="hm") for text in args.texts))
        signal.sigwait({signal.SIGTERM})


if __name__ == "__main__":
    main()
