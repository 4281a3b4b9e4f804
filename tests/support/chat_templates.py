"""Chat templates with the tokens and turns of known models, and the same conversations put together by hand."""

from collections.abc import Callable
from typing import Any

Messages = list[dict[str, Any]]
Pieces = list[tuple[str, bool]]
"""Text, and whether it is an answer with its stop token."""

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LOOP = "{% for m in messages %}"

CHATML = LOOP + TURN + "{% endfor %}" + ASK

SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nBe Smol.<|im_end|>\n{% endif %}" + TURN + "{% endfor %}" + ASK
)
"""A system turn of its own where there is none."""

QWEN2 = (
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nBe Qwen.<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if not (loop.first and m.role == 'system') %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

QWEN3 = (
    "{%- set ns = namespace(asked=0) %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.asked = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role != 'assistant' %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- else %}{%- set said = m.content %}{%- set why = '' %}"
    "{%- if m.reasoning_content is string %}{%- set why = m.reasoning_content %}{%- elif '</think>' in said %}"
    "{%- set why = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}{%- if loop.index0 > ns.asked and (loop.last or why) %}"
    "{{- '<think>\n' + why.strip('\n') + '\n</think>\n\n' }}{%- endif %}{{- said.lstrip('\n') + '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""The reasoning of an answer goes once another question has come."""

LLAMA3 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- endif %}{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}{{- 'Today: ' + date_string + '\n\n' }}"
    "{{- system }}{{- '<|eot_id|>' }}{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
"""With the date, and white space around each message cut off."""

MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}" + TURN + "{% endif %}{% endfor %}" + ASK
)
MARKED_TEXT_ALONE = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
MARKED_HEADER_TOO = (
    "{%- for m in messages -%}\n  {%- if m.role == 'assistant' -%}\n    {% generation %}\n"
    "    {%- set said = m.content -%}\n    {{ '<|im_start|>assistant\n' + said + '<|im_end|>\n' }}\n"
    "    {%- endgeneration -%}\n  {%- else -%}\n    {{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}\n"
    "  {%- endif -%}\n{%- endfor -%}\n{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}\n"
)
"""SmolLM3's way: the markers stand around the whole turn, the line after its stop token too."""

SPECIALS = {
    "im": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"],
    "llama3": [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<pad>",
    ],
}


def im_pieces(messages: Messages, *, system: str = "", think: bool = False) -> Pieces:
    """ChatML; ``system`` where none is given; ``think``: an empty thought before the last answer."""
    pieces: Pieces = []
    if system and messages[0]["role"] != "system":
        pieces.append((f"<|im_start|>system\n{system}<|im_end|>\n", False))
    for message in messages:
        answer = message["role"] == "assistant"
        thought = "<think>\n\n</think>\n\n" if think and message is messages[-1] else ""
        said = thought + message["content"] + "<|im_end|>"
        pieces += [(f"<|im_start|>{message['role']}\n", False), (said, answer), ("\n", False)]
    return pieces


def llama3_pieces(messages: Messages) -> Pieces:
    first, rest = ("", messages) if messages[0]["role"] != "system" else (messages[0]["content"], messages[1:])
    head = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    pieces = [(f"<|begin_of_text|>{head('system')}Today: 26 Jul 2024\n\n{first.strip()}<|eot_id|>", False)]
    for message in rest:
        said = message["content"].strip() + "<|eot_id|>"
        pieces += [(head(message["role"]), False), (said, message["role"] == "assistant")]
    return pieces


def made(make_tokenizer: Callable[..., Any], template: str, kind: str = "im") -> Any:
    """A tokenizer with the template and the tokens it writes."""
    tokens = {"eos_token": "<|endoftext|>", "pad_token": "<pad>"}
    if kind == "llama3":
        tokens |= {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return make_tokenizer(SPECIALS[kind], template, **tokens)


WAYS: dict[str, tuple[str, str, Callable[[Messages], Pieces]]] = {
    "chatml": (CHATML, "im", im_pieces),
    "smollm2": (SMOLLM2, "im", lambda messages: im_pieces(messages, system="Be Smol.")),
    "qwen2": (QWEN2, "im", lambda messages: im_pieces(messages, system="Be Qwen.")),
    "llama3": (LLAMA3, "llama3", llama3_pieces),
    "marked": (MARKED, "im", im_pieces),
    "marked-text-alone": (MARKED_TEXT_ALONE, "im", im_pieces),
    "marked-header-too": (MARKED_HEADER_TOO, "im", im_pieces),
}
"""Templates that can be masked: the template, its kind of tokens, and its conversations by hand."""
