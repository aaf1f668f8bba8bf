"""No secret in what a run writes: neither values under a secret's name nor the secrets of the environment."""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Mapping
from typing import Any

# the last word of a name: HF_TOKEN, OPENAI_KEY, AWS_SECRET_ACCESS_KEY, GITHUB_PAT, a header's x-api-key
WORDS = "token|secret|password|passwd|apikey|key|credentials?|authorization|pat"
SECRET_NAME = re.compile(rf"(^|[_-])({WORDS})$", re.IGNORECASE)
SECRET_ARGUMENT = re.compile(rf"(\w*(?:{WORDS})\s*=\s*)(['\"]).*?\2", re.IGNORECASE)
SHORTEST = 6  # a shorter value of the environment is a switch, not a secret


def redacted(value: Any, environment: Mapping[str, str] = os.environ) -> Any:
    """`value` with every secret replaced by the name that it goes by, in angle brackets."""
    if isinstance(value, dict):
        return {
            key: f"<{key}>" if SECRET_NAME.search(str(key)) and isinstance(item, str) else redacted(item, environment)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redacted(item, environment) for item in value]
    if not isinstance(value, str) or isinstance(value, enum.Enum):
        return value
    for name, secret in environment.items():
        if SECRET_NAME.search(name) and len(secret) >= SHORTEST:
            value = value.replace(secret, f"<{name}>")
    return SECRET_ARGUMENT.sub(r"\1<not shown>", value)
