"""Chat templates: what a good one renders, and what a hostile one cannot do."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.runtime.engines import TINY

from wherry_protocol.worker import ChatMessage
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.tokenization.chat_template import ChatTemplate, TemplateError, find_template
from wherry_runtime.tokenization.tokenizer import Tokenizer

HELLO = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content='Say "hi" <now> €')]


@pytest.fixture
def opened() -> Iterator[list[ChatTemplate]]:
    templates: list[ChatTemplate] = []
    yield templates
    for template in templates:
        template.close()


def render(opened: list[ChatTemplate], source: str, messages: list[ChatMessage] = HELLO) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, time_limit_s=3, output_limit=100_000)
    opened.append(template)
    return template.render(messages)


def test_the_sample_models_template(opened: list[ChatTemplate]) -> None:
    source = find_template(TINY, Tokenizer(TINY).settings)
    assert source is not None
    assert render(opened, source) == (
        '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay "hi" <now> €<|im_end|>\n<|im_start|>assistant\n'
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages|length }}{{ eos_token }}", "<s>2</s>"),
        ("{{ messages[1].content|tojson }}", '"Say \\"hi\\" <now> €"'),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}", "user"),
        ("{% generation %}x{% endgeneration %}{{ add_generation_prompt }}", "xTrue"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{{ messages[0].name is defined }}", "False"),
        ("  {% if true %}\n  a\n  {% endif %}\n", "  a\n"),
        ("{{ strftime_now('%Y')|length }}", "4"),
        ("{{ tools is defined }}", "False"),
    ],
)
def test_renders_as_templates_expect(opened: list[ChatTemplate], source: str, expected: str) -> None:
    assert render(opened, source) == expected


def test_a_refusal_is_the_messages_fault(opened: list[ChatTemplate]) -> None:
    with pytest.raises(TemplateError, match="refused the messages: roles must alternate") as refusal:
        render(opened, "{{ raise_exception('roles must alternate') }}")
    assert refusal.value.refused


LOOP = "{% for i in range(90000) %}" * 3 + "{% endfor %}" * 3
HOSTILE = {
    "nested loops": (LOOP, "ran for more than 3 s"),
    "a huge range": ("{{ range(10**12)|list|length }}", "too big|too much memory|passed"),
    "endless output": (LOOP.replace("{% endfor %}", "x{% endfor %}", 1), "passed 100000 characters"),
    "a huge string": ("{{ 'a' * 10**11 }}", "too much memory|passed"),
    "doubling": (
        "{% set ns = namespace(s='aa') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "too much memory|ran for|ended",
    ),
    "a huge number": ("{{ 10 ** (10 ** 9) }}", "ran for|too much memory|ended"),
    "format width": ("{{ '%0999999999d' % 1 }}{{ '{:>999999999}'.format(1) }}", "too much memory|passed|ended"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError|ended"),
    "the interpreter": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "globals of a function": ("{{ raise_exception.__globals__.sys }}", "SecurityError"),
    "format to attributes": ("{{ '{0.__class__.__mro__}'.format(1) }}", "SecurityError"),
    "changing its input": ("{{ messages.append(1) }}", "SecurityError"),
    "reading files": ("{% include '/etc/passwd' %}", "failed"),
    "broken syntax": ("{% for %}", "TemplateSyntaxError"),
    "undefined": ("{{ nothing.at.all }}", "UndefinedError"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_an_error_in_time(opened: list[ChatTemplate], name: str) -> None:
    source, message = HOSTILE[name]
    began = time.monotonic()
    with pytest.raises(TemplateError, match=message) as failure:
        render(opened, source)
    assert not failure.value.refused
    assert time.monotonic() - began < 20  # the limit is 3 s; the rest is for a busy machine


def test_the_next_rendering_works_after_one_was_killed(opened: list[ChatTemplate]) -> None:
    source = "{% if messages|length > 1 %}" + LOOP + "{% endif %}fine"
    template = ChatTemplate(source, {}, time_limit_s=1)
    opened.append(template)
    with pytest.raises(TemplateError, match="ran for more than 1 s"):
        template.render(HELLO)
    assert template.render(HELLO[:1]) == "fine"


def test_a_helper_process_that_died_is_started_again(opened: list[ChatTemplate]) -> None:
    template = ChatTemplate("ok", {})
    opened.append(template)
    assert template.render(HELLO) == "ok"
    process = template._process
    assert process is not None
    process.kill()
    process.wait()
    assert template.render(HELLO) == "ok"


def test_messages_larger_than_a_pipe(opened: list[ChatTemplate]) -> None:
    big = [ChatMessage(role="user", content="é" * 500_000)]
    template = ChatTemplate("{{ messages[0].content }}", {}, output_limit=600_000)
    opened.append(template)
    assert template.render(big) == big[0].content


def test_where_templates_are_found(tmp_path: Path) -> None:
    assert find_template(tmp_path, {}) is None
    assert find_template(tmp_path, {"chat_template": "x"}) == "x"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert find_template(tmp_path, {"chat_template": named}) == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert find_template(tmp_path, {"chat_template": "x"}) == "file"
    with pytest.raises(ModelError, match="not text of at most"):
        find_template(tmp_path / "none", {"chat_template": 5})
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ModelError, match=r"chat_template\.jinja"):
        find_template(tmp_path, json.loads("{}"))
