"""Ask a running server for JSON that follows a schema; a grammar forbids every other token.

On a CPU the grammar backend must be named when the server starts, on a GPU it is the default. The
second flag forbids blanks between tokens: a small model may go on writing them for ever.

    bash launch/serve.sh -- --grammar-backend xgrammar --constrained-json-disable-any-whitespace
    .venv/bin/python examples/structured_output.py --url http://127.0.0.1:30000
"""

import argparse
import json

import openai

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z_]{1,20}$"},
        "returns": {"type": "string", "enum": ["bool", "int", "str", "None"]},
        "num_arguments": {"type": "integer", "minimum": 0, "maximum": 9},
        "is_public": {"type": "boolean"},
    },
    "required": ["name", "returns", "num_arguments", "is_public"],
    "additionalProperties": False,
}
PROMPT = """Describe this function as JSON:
def count_words(text, separator=None):
    return len(text.split(separator))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--model", help="the served model's name; default: the server's only one")
    parser.add_argument("--prompt", default=PROMPT)
    options = parser.parse_args()

    # A server without --api-key takes any key, but the client wants one.
    client = openai.OpenAI(base_url=f"{options.url}/v1", api_key="none")
    answer = client.chat.completions.create(
        model=options.model or client.models.list().data[0].id,
        messages=[{"role": "user", "content": options.prompt}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "function", "schema": SCHEMA, "strict": True},
        },
        max_tokens=300,
        temperature=0,
    )
    text = answer.choices[0].message.content
    print(json.dumps(json.loads(text), indent=2))


if __name__ == "__main__":
    main()
