"""Conversations to text."""

import json

import pytest

from shoal.errors import UserError
from shoal.serve.generation.bodies import Message, Part, end_tokens
from shoal.serve.generation.chat import chat_facts, chat_text
from shoal.serve.http.messages import HttpError

TALK = [Message(role="system", content="be brief"), Message(role="user", content=[Part(type="text", text="hi")])]
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'developer' %}{{ raise_exception('no developers') }}{% endif %}"
    "<{{ message.role }}>{{ message['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_conversation_is_written_as_transformers_writes_it():
    from transformers.utils.chat_template_utils import render_jinja_template

    facts = {"template": TEMPLATE, "bos": "<s>", "eos": "</s>"}
    said = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    (expected,), _ = render_jinja_template(
        [said], chat_template=TEMPLATE, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert chat_text(TALK, facts) == expected == "<system>be brief</s>\n<user>hi</s>\n<assistant>"


def test_without_a_template_each_message_is_a_line():
    assert chat_text(TALK, {}) == "system: be brief\nuser: hi\nassistant:"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (TEMPLATE, "no developers"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[0]['role'] + 1 }}", "template"),
        ("{% for", "template"),
        ("{{ 'x' * 2000000 }}", "longer than"),
    ],
)
def test_a_template_that_refuses_or_fails_or_reaches_out_is_one_line(template, why):
    with pytest.raises(HttpError, match=why) as refused:
        chat_text([Message(role="developer", content="x")], {"template": template})
    assert refused.value.status == 400


def test_the_folder_says_its_template_and_its_end(tmp_path):
    assert chat_facts(tmp_path) == {"template": "", "bos": "", "eos": ""}
    settings = {"chat_template": "one", "bos_token": {"content": "<s>"}, "eos_token": "<over>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert chat_facts(tmp_path) == {"template": "one", "bos": "<s>", "eos": "<over>"}
    named = [{"name": "tools", "template": "two"}, {"name": "default", "template": "three"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert chat_facts(tmp_path)["template"] == "three"
    (tmp_path / "chat_template.jinja").write_text("four")
    assert chat_facts(tmp_path)["template"] == "four"
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        chat_facts(tmp_path)


def test_the_tokens_that_end_an_answer_are_the_folders_and_the_usual_ones():
    class Known:
        def special(self, name):
            return {"<over>": 9, "</s>": 2}.get(name)

    assert end_tokens(Known(), {"chat": {"eos": "<over>"}}) == [2, 9]
    assert end_tokens(Known(), {}) == [2]
