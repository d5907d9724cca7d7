"""The offline runtime API: SGLang's Engine, woven."""

import os
from collections.abc import Mapping
from typing import Any

from sglang.srt.entrypoints.engine import Engine as SGLangEngine

from sglang_tokenweave.config import ENVIRONMENT_VARIABLE, TokenWeaveConfig, export
from sglang_tokenweave.preflight import check_plugin
from sglang_tokenweave.tuning import given


class Engine(SGLangEngine):  # type: ignore[misc] # SGLang has no type information
    """`sglang.Engine` with TokenWeave switched on."""

    def __init__(self, *, tokenweave: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Start the engine.

        Args:
            tokenweave: options of `TokenWeaveConfig` by name, such as `{"min_tokens": 512}`.
            kwargs: SGLang's server arguments.

        Raises:
            ConfigError: an option is unknown, out of range, or contradicts another one.
            TableError: the file of a tuned table cannot be used.
        """
        options = {"enabled": True, **(tokenweave or {})}
        given.check(TokenWeaveConfig.from_mapping(options))
        check_plugin()
        before = os.environ.get(ENVIRONMENT_VARIABLE)
        export(options)
        try:
            super().__init__(**kwargs)  # its workers inherit the environment as of now
        finally:
            if before is None:
                del os.environ[ENVIRONMENT_VARIABLE]
            else:
                os.environ[ENVIRONMENT_VARIABLE] = before
