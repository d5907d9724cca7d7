"""Carry out a Dockerfile without an engine: every RUN as it stands, in the root made so far.

Each COPY and RUN makes a layer, which is a folder. An instruction that is not understood is an
error, so that nothing of the file goes untried.
"""

import glob
import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Template

from docker.utils.build import exclude_paths
from dockerfile_parse import DockerfileParser
from dockerfile_parse.util import extract_key_values
from sandbox import Bind, Sandbox

RUN_DEADLINE_S = 900


class BuildError(AssertionError):
    """An instruction failed; the text shows it and what it printed."""


@dataclass(frozen=True)
class Image:
    """What a stage has made so far."""

    layers: tuple[Path, ...]  # the topmost first
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str = "0:0"
    workdir: str = "/"
    entrypoint: Sequence[str] = ()
    healthcheck: Sequence[str] = ()
    volumes: Sequence[str] = ()
    arguments: Mapping[str, str] = field(default_factory=dict)  # ARG, of one stage

    def expand(self, text: str) -> str:
        """Replace $NAME and ${NAME} as Docker does outside of RUN."""
        return Template(text).substitute({**self.arguments, **self.environment})


@dataclass
class Build:
    """A build of one Dockerfile in `folder`."""

    dockerfile: Path
    context: Path
    folder: Path
    bases: Mapping[str, Image]  # by the names that stand after FROM
    build_args: Mapping[str, str]
    host_environment: Mapping[str, str] = field(default_factory=dict)  # seen by each RUN
    host_binds: Sequence[Bind] = ()

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self._context = self._filtered_context()
        self._images: dict[str, Image] = {}
        self._globals: dict[str, str] = {}
        self._stages: dict[str, list[tuple[str, str]]] = {}
        content = io.BytesIO(self.dockerfile.read_bytes())
        for each in DockerfileParser(fileobj=content).structure:
            instruction, value = each["instruction"], each["value"]
            if instruction == "FROM":
                name = re.fullmatch(r"\S+ AS (\S+)", value)
                assert name, f"a stage without a name: FROM {value}"
                self._stages[name[1]] = [(instruction, value)]
            elif instruction == "ARG" and not self._stages:
                self._globals |= self._argument(value)
            elif instruction != "COMMENT":
                self._stages[list(self._stages)[-1]].append((instruction, value))

    def stage(self, name: str) -> Image:
        """Build a stage, and before it the stages that it needs."""
        if name not in self._images:
            (_, origin), *rest = self._stages[name]
            base = Template(origin.split()[0]).substitute(self._globals)
            image = self.stage(base) if base in self._stages else self.bases[base]
            image = replace(image, arguments={})
            for instruction, value in rest:
                image = self.apply(image, instruction, value)
            self._images[name] = image
        return self._images[name]

    def apply(self, image: Image, instruction: str, value: str) -> Image:
        """Carry out one instruction on `image`."""
        if instruction == "RUN":
            return self._run(image, value)
        if instruction == "COPY":
            return self._copy(image, value)
        if instruction == "ARG":
            return replace(image, arguments={**image.arguments, **self._argument(value)})
        if instruction == "ENV":
            pairs = extract_key_values(
                env_replace=True,
                args=dict(image.arguments),
                envs=dict(image.environment),
                instruction_value=value,
            )
            return replace(image, environment={**image.environment, **dict(pairs)})
        if instruction == "HEALTHCHECK":
            return replace(image, healthcheck=json.loads(value.partition("CMD ")[2]))
        if instruction == "VOLUME":
            return replace(image, volumes=(*image.volumes, value))
        if instruction == "EXPOSE":
            return image
        simple: dict[str, Callable[[str], object]] = {
            "USER": image.expand,
            "WORKDIR": image.expand,
            "ENTRYPOINT": json.loads,
        }
        assert instruction in simple, f"{instruction} {value}: not understood"
        return replace(image, **{instruction.lower(): simple[instruction](value)})

    def _argument(self, value: str) -> dict[str, str]:
        name, _, default = value.partition("=")
        return {name: self.build_args.get(name, self._globals.get(name, default.strip('"')))}

    def _run(self, image: Image, value: str) -> Image:
        flags, command = _split_flags(value)
        binds = [self._bind(flag) for flag in flags]
        layer = self._new_layer()
        sandbox = Sandbox(
            image.layers, layer, [*binds, *self.host_binds], image.user, image.workdir
        )
        environment = {
            "HOME": "/root",
            **self.host_environment,
            **image.arguments,
            **image.environment,
        }
        root = self.folder / "root"
        root.mkdir(exist_ok=True)
        done = sandbox.run(root, ["/bin/sh", "-c", command], environment, RUN_DEADLINE_S)
        if done.returncode:
            raise BuildError(f"RUN {value}\nended with {done.returncode}:\n{done.stdout[-8000:]}")
        return replace(image, layers=(layer, *image.layers))

    def _bind(self, flag: str) -> Bind:
        kind, _, options = flag.partition("=")
        assert kind == "--mount", f"{flag}: not understood"
        fields = dict(option.split("=", 1) for option in options.split(","))
        assert fields.pop("type") == "bind", f"{flag}: not understood"
        source, target = fields.pop("source"), fields.pop("target")
        folders = self.stage(fields.pop("from")).layers if "from" in fields else [self._context]
        assert not fields, f"{flag}: not understood"
        found = [path for folder in folders if (path := folder / source.lstrip("/")).exists()]
        if not found:
            raise BuildError(f"RUN {flag}: the context has no {source} (see .dockerignore)")
        return Bind(found[0], target)

    def _copy(self, image: Image, value: str) -> Image:
        flags, rest = _split_flags(value)
        assert not flags, f"COPY {value}: not understood"
        *patterns, target = image.expand(rest).split()
        layer = self._new_layer()
        for pattern in patterns:
            sources = [Path(path) for path in glob.glob(str(self._context / pattern))]
            if not sources:
                raise BuildError(f"COPY {value}: the context has no {pattern} (see .dockerignore)")
            for source in sources:
                path = layer / target.lstrip("/")
                if source.is_dir():
                    shutil.copytree(source, path, dirs_exist_ok=True)
                else:
                    path = path / source.name if target.endswith("/") else path
                    path.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(source, path)
        return replace(image, layers=(layer, *image.layers))

    def _filtered_context(self) -> Path:
        """Copy what .dockerignore lets through, by the rules of Docker's own client."""
        context = self.folder / "context"
        patterns = (self.context / ".dockerignore").read_text().splitlines()
        for name in sorted(exclude_paths(str(self.context), patterns)):
            if (self.context / name).is_file():
                (context / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.context / name, context / name)
        return context

    def _new_layer(self) -> Path:
        layer = Path(tempfile.mkdtemp(dir=self.folder, prefix="l"))
        layer.chmod(0o755)
        return layer


def _split_flags(value: str) -> tuple[list[str], str]:
    flags = []
    while match := re.match(r"(--\w+(?:=\S+)?)\s+", value):
        flags.append(match[1])
        value = value[match.end() :]
    return flags, value
