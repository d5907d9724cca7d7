"""The tests' own reader of Dockerfiles: what it does not understand must fail, not go untried."""

from pathlib import Path

import pytest
from dockerfile import Build, BuildError, Image


@pytest.fixture
def build(tmp_path: Path):
    """Return a function from the lines of a Dockerfile, on an empty base, to its one stage."""
    context = tmp_path / "checkout"
    context.mkdir()
    for name in ("kept", "ignored"):
        (context / name).write_text(name)
    (context / ".dockerignore").write_text("ignored\n")

    def stage(*lines: str) -> Image:
        file = tmp_path / "Dockerfile"
        file.write_text("\n".join(["ARG BASE=other", "FROM ${BASE} AS stage", *lines]))
        bases = {"base": Image((tmp_path,), {"PATH": "/bin"})}
        return Build(file, context, tmp_path / "build", bases, {"BASE": "base"}).stage("stage")

    return stage


def test_the_context_is_what_dockerignore_lets_through(build):
    image = build("COPY kept /there/")
    assert (image.layers[0] / "there" / "kept").read_text() == "kept"
    with pytest.raises(BuildError, match="the context has no ignored"):
        build("COPY ignored /there/")


def test_variables_are_replaced_as_docker_does(build):
    image = build("ARG WHERE=/here", "ENV PATH=$WHERE:${PATH} NEXT=2", "WORKDIR ${WHERE}/$NEXT")
    assert (image.environment["PATH"], image.workdir) == ("/here:/bin", "/here/2")
    with pytest.raises(KeyError, match="UNKNOWN"):
        build("WORKDIR $UNKNOWN")


@pytest.mark.parametrize(
    "line",
    [
        "ONBUILD RUN true",
        "ADD kept /there/",
        "COPY --link kept /there/",
        "RUN --network=none true",
        "RUN --mount=type=secret,id=x,source=y,target=/z true",
        "RUN --mount=type=bind,source=kept,target=/z,rw=true true",
    ],
)
def test_what_is_not_understood_is_an_error(build, line):
    with pytest.raises(AssertionError, match="not understood"):
        build(line)
