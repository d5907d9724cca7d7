"""Coverage-guided fuzzing of our own inputs: `python tests/fuzzing.py FOLDER [options]`.

Inputs that lead to new branches are kept, in FOLDER, and mutated further, so it reaches what
arbitrary data does not. At the first error that is not the documented one it ends with a traceback
and leaves the input in FOLDER. The options are libFuzzer's: `-max_total_time=600` ends after ten
minutes. It needs the package atheris.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["sglang_tokenweave", "launch.docker.knobs"]):
    from launch.docker import knobs
    from sglang_tokenweave import compiler
    from sglang_tokenweave.config import ENVIRONMENT_VARIABLE, ConfigError, TokenWeaveConfig
    from sglang_tokenweave.doctor import answers
    from sglang_tokenweave.doctor.facts import Failure, Nvrtc
    from sglang_tokenweave.tuning import text
    from sglang_tokenweave.tuning.nodes import TableError
    from sglang_tokenweave.tuning.rows import plan_table

from tuned_tables import WEAVE, bucket, table

KEY = "0" * 64


def read_environment(data):
    text = data.replace(b"\0", b"").decode(errors="surrogateescape")
    try:
        config = TokenWeaveConfig.from_environment({ENVIRONMENT_VARIABLE: text})
    except ConfigError:
        return
    assert TokenWeaveConfig.from_mapping(config.as_dict()) == config


def read_knobs(data):
    lines = data.replace(b"\0", b"").decode(errors="surrogateescape").split("\n")
    variables = dict(line.partition("=")[::2] for line in lines)
    try:
        settings = knobs.read({"MODEL": "m", **variables}, [])
    except knobs.KnobError:
        return
    assert all(isinstance(word, str) for word in knobs.server_command(settings, 2))


def read_table(data):
    try:
        read = text.from_text(data.decode(errors="replace"))
    except TableError:
        return
    assert text.from_text(text.to_text(read)) == read
    plan_table(read)


def read_entry(data):
    """Most inputs get the right checksum, so that what lies behind it is reached, too."""
    if data[:1] != b"x":
        data = compiler._checksum(KEY, data) + b"\n" + data
    (FOLDER / f"{KEY}.kernel").write_bytes(data)
    compiled = compiler._load(FOLDER, KEY)
    assert compiled is None or isinstance(compiled, compiler.Compiled)


def read_answer(data):
    try:
        answer = answers.from_text(data)
    except ValueError:
        return
    assert type(answer).__name__ in answers._KINDS


# Each with inputs to start from: what is good leads further than what is empty.
TUNED = text.to_text(table(bucket(64), bucket(1024, WEAVE), bucket(2048, WEAVE)))
TARGETS = {
    read_environment: ('{"enabled": true, "strict": false, "min_tokens": 512, "ctas": 4}',),
    read_knobs: ("TP=2\nPORT=80\nTOKENWEAVE_CTAS=4\nEXTRA_ARGS=--a 'b c'", "DEVICE=cpu"),
    read_table: (TUNED, text.to_text(table())),
    read_entry: ('{"name": "f", "resources": {}, "ptx": null}', "x"),
    read_answer: (answers.to_text(Nvrtc((13, 0), (90,))), answers.to_text(Failure("a", "b"))),
}
WORDS = [
    *TokenWeaveConfig().as_dict(),
    "fuse",
    "spread_us",
    *(knob.name for knob in knobs.table()),
    "null",
    "true",
]


def one_input(data):
    """Let the first byte choose among the targets."""
    [*TARGETS][data[0] % len(TARGETS) if data else 0](data[1:])


def prepare(folder):
    """Write what to start from, and words to put in; return the options that name them."""
    corpus, words = folder / "corpus", folder / "words"
    corpus.mkdir(parents=True, exist_ok=True)
    for index, seeds in enumerate(TARGETS.values()):
        for number, seed in enumerate(seeds):
            (corpus / f"{index}-{number}").write_bytes(bytes([index]) + seed.encode())
    words.write_text("".join(f'"{word}"\n' for word in WORDS))
    return [f"-dict={words}", f"-artifact_prefix={folder}/", str(corpus)]


if __name__ == "__main__":
    program, name, *options = sys.argv
    FOLDER = Path(name)
    compiler._warn = lambda message: None
    atheris.Setup([program, *options, *prepare(FOLDER)], one_input)
    atheris.Fuzz()  # leaves the process
