"""Chat with a running server through the openai client: the whole answer, then the same streamed.

bash launch/serve.sh                     # in another shell
.venv/bin/python examples/chat.py --url http://127.0.0.1:30000
"""

import argparse

import openai

PROMPT = '''def read_lines(path):
    """Return the lines of a text file without their ends."""
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--model", help="the served model's name; default: the server's only one")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-tokens", type=int, default=120)
    options = parser.parse_args()

    # A server without --api-key takes any key, but the client wants one.
    client = openai.OpenAI(base_url=f"{options.url}/v1", api_key="none")
    request = {
        "model": options.model or client.models.list().data[0].id,
        "messages": [{"role": "user", "content": options.prompt}],
        "max_tokens": options.max_tokens,
        "temperature": 0,
    }

    answer = client.chat.completions.create(**request)
    print("--- whole")
    print(answer.choices[0].message.content)

    print("--- streamed")
    for chunk in client.chat.completions.create(**request, stream=True):
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
