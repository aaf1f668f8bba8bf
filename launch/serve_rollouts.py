"""Serve rollouts to a trainer in another process: vLLM's OpenAI server with this project's weight sync.

    python launch/serve_rollouts.py --model Qwen/Qwen3-1.7B --port 8000
    accelerate launch launch/grpo_math.py --vllm_mode server --vllm_server_base_url http://127.0.0.1:8000

Start it with the model that the trainer starts from.  It listens on loopback unless --host says otherwise, and then
wants a token: set FURA_ROLLOUT_TOKEN to the same secret for both.  GET /health says when it is up.  A server that dies
is started again; the trainer finds out and brings it to the policy's weights before it takes another rollout from it.
Several servers are replicas: give the trainer their addresses with commas between.

Whatever else is given goes to vLLM: --dtype bfloat16, --tensor-parallel-size 2, --max-model-len 2048 ...
"""

from __future__ import annotations

import argparse
import sys


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model", default="quickstart", help="checkpoint folder or hub id; the policy's base [quickstart]"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on [127.0.0.1]")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on [8000]")
    parser.add_argument("--restarts", type=int, default=10, help="how often a server that died is started again [10]")
    return parser.parse_known_args(argv)


def main(argv: list[str]) -> int:
    args, extra = parse(argv)
    from fura_rl.serve import serve

    try:
        from fura_rl.config import resolve_model

        return serve(resolve_model(args.model), args.host, args.port, extra, args.restarts)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
