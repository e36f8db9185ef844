"""A conversation as the text that a model was trained to go on from: by the folder's template, or as plain lines."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import UserError
from shoal.serve.generation.bodies import Message
from shoal.serve.http.messages import HttpError

if TYPE_CHECKING:
    from jinja2 import Template

LONGEST = 1 << 20  # characters of a rendered conversation


def chat_facts(folder: Path) -> dict[str, Any]:
    """What a Hugging Face folder says of conversations: {"template", "bos", "eos"}, each "" where it says nothing.

    Raises UserError when its tokenizer_config.json is none."""
    settings: Any = {}
    file = folder / "tokenizer_config.json"
    if file.exists():
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{str(file)!r} is not JSON: {error}.") from None
        if not isinstance(settings, dict):
            raise UserError(f"{str(file)!r} must hold a JSON object.")
    template = settings.get("chat_template") or ""
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not isinstance(template, str):  # several by name
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default") or ""
    tokens = {name: settings.get(f"{name}_token") or "" for name in ("bos", "eos")}
    texts = {
        name: token.get("content", "") if isinstance(token, dict) else str(token) for name, token in tokens.items()
    }
    return {"template": template, **texts}


def chat_text(messages: list[Message], facts: Mapping[str, Any]) -> str:
    """Raises HttpError 400 when the template refuses the conversation, or fails on it."""
    said = [
        {
            "role": message.role,
            "content": message.content
            if isinstance(message.content, str)
            else "".join(part.text for part in message.content),
        }
        for message in messages
    ]
    if not facts.get("template"):
        return "".join(f"{each['role']}: {each['content']}\n" for each in said) + "assistant:"
    from jinja2 import TemplateError

    tokens = {"bos_token": facts.get("bos", ""), "eos_token": facts.get("eos", "")}
    try:
        text = _compiled(facts["template"]).render(messages=said, add_generation_prompt=True, **tokens)
    except (TemplateError, TypeError, ValueError, OverflowError) as error:
        why = " ".join(str(error).split())[:200]
        raise HttpError(
            400, f"the model's chat template does not take this conversation: {why}", param="messages"
        ) from None
    if len(text) > LONGEST:
        raise HttpError(400, f"the conversation is longer than {LONGEST} characters", param="messages")
    return text


@lru_cache(maxsize=4)
def _compiled(template: str) -> "Template":
    """Templates come with a model and are code: they run in Jinja's sandbox, which keeps them from everything around.

    Jinja is there because torch needs it."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(why: str) -> None:
        raise TemplateError(why)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)
