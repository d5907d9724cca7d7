"""Complete a batch of prompts with no server: the offline Engine, woven.

.venv/bin/python examples/offline_batch.py --model launch/demo_model
"""

import argparse
import os

import torch

from sglang_tokenweave import cpu

PROMPTS = [
    "import os\nimport sys\n\n\ndef main(",
    'class Stack:\n    """A last-in, first-out list."""\n\n    def __init__(self',
    "    for line in file:\n        if not line",
    "    def test_",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder or, on a GPU, a name")
    parser.add_argument("--tp", type=int, default=2, help="ranks; default: 2")
    parser.add_argument("--max-tokens", type=int, default=60)
    options = parser.parse_args()

    arguments = {"model_path": options.model, "tp_size": options.tp}
    tokenweave = {}
    if not torch.cuda.is_available():
        os.environ.update(cpu.environment(options.tp))  # SGLang reads it when it is imported
        arguments |= cpu.engine_arguments(options.tp)
        tokenweave["min_tokens"] = 16  # the default is for GPUs: such a batch would stay whole

    from sglang_tokenweave.engine import Engine

    engine = Engine(**arguments, tokenweave=tokenweave)
    try:
        sampling = {"temperature": 0, "max_new_tokens": options.max_tokens}
        for prompt, answer in zip(PROMPTS, engine.generate(PROMPTS, sampling), strict=True):
            print(f"--- {prompt!r}\n{answer['text']}")
        state = engine.get_server_info()["internal_states"][0]["tokenweave"]
        print(f"--- prefill tokens by plan: {state['tokens']['prefill']}")
    finally:
        engine.shutdown()


if __name__ == "__main__":  # the ranks are spawned and import this file again
    main()
