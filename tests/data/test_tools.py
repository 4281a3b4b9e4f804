"""Rows that offer tools and call them: what templates of several kinds write of them is what transformers writes."""

import json
from typing import Any

import pytest

from jrlhf.data import BadRow, DataError, load_prompts, load_rankings, load_sft, load_texts
from jrlhf.data.encode import Encoder
from jrlhf.data.formats import Example, parse_answers, parse_prompt, parse_ranking, parse_sft
from jrlhf.data.messages import without_fill
from tests.support.chat_templates import CHATML, made

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "unit": None}}}
ASK = {"role": "user", "content": "Is it raining in Oslo?"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RAIN, YES = {"role": "tool", "content": "rain"}, {"role": "assistant", "content": "Yes, it rains."}
MESSAGES = [ASK, CALLS, RAIN, YES]

HEAD = (
    "{%- if tools %}{{- '<|im_start|>system\n# Tools\n' }}{%- for tool in tools %}{{- tool | tojson + '\n' }}"
    "{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}{%- for m in messages %}{%- if m.role == 'tool' %}"
    "{{- '<|im_start|>user\n' + m.content | tojson + '<|im_end|>\n' }}{%- else %}{{- '<|im_start|>' + m.role + '\n' }}"
)
TAIL = (
    "{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
QWEN = (
    HEAD + "{%- if m.content %}{{- m.content }}{%- endif %}{%- for call in m.tool_calls or [] %}"
    '{%- set f = call.function or call %}{{- \'<call>\n{"name": "\' + f.name + \'", "arguments": \' }}'
    "{{- f.arguments | tojson }}{{- '}\n</call>' }}{%- endfor %}" + TAIL
)
"""Arguments as an object, and any content."""
DEEPSEEK = (
    HEAD + "{%- if m.role == 'assistant' and m.content is not string %}{%- for call in m.tool_calls %}"
    "{{- '<call>' + call.function.name + '\n' + call.function.arguments + '</call>' }}{%- endfor %}"
    "{%- else %}{{- m.content }}{%- endif %}" + TAIL
)
"""Arguments as JSON text, and calls only where there is no content."""
PRINTS = (
    HEAD + "{{- '' + m.content }}{%- if m.tool_calls %}{%- for call in m.tool_calls %}"
    "{{- '<call>' }}{{- call.function | tojson }}{%- endfor %}{%- endif %}" + TAIL
)
"""Can write no content that is not there."""
XML = (
    HEAD + "{%- if m.content %}{{- m.content }}{%- endif %}{%- for call in m.tool_calls or [] %}"
    "{{- '<function=' + call.function.name + '>' }}{%- for key, value in call.function.arguments.items() %}"
    "{{- '<' + key + '>\n' }}{{- value }}{{- '\n</' + key + '>' }}{%- endfor %}{%- endfor %}" + TAIL
)
MARKED = QWEN.replace(
    "{%- if m.content %}",
    "{%- if m.role != 'assistant' %}{{- m.content + '<|im_end|>\n' }}{%- else %}{% generation %}{%- if m.content %}",
    1,
).replace(
    TAIL, "{{- '<|im_end|>' }}{% endgeneration %}{{- '\n' }}{%- endif %}" + TAIL.removeprefix("{{- '<|im_end|>\n' }}")
)
TEMPLATES = {"qwen": QWEN, "deepseek": DEEPSEEK, "prints": PRINTS, "xml": XML, "marked": MARKED}
AS_TEXT = {"deepseek"}
CONTENTS = {"qwen": "", "deepseek": None, "prints": "", "xml": "", "marked": ""}
"""What each template must be given beside calls, for transformers to write what was meant."""


@pytest.fixture(scope="module", params=TEMPLATES)
def way(request: pytest.FixtureRequest, make_tokenizer: Any) -> tuple[str, Any]:
    return request.param, made(make_tokenizer, TEMPLATES[request.param])


@pytest.fixture(scope="module")
def qwen(make_tokenizer: Any) -> Any:
    return made(make_tokenizer, QWEN)


@pytest.fixture(scope="module")
def plain(make_tokenizer: Any) -> Any:
    return made(make_tokenizer, CHATML)


def theirs(name: str, tokenizer: Any, messages: list[dict[str, Any]], **more: Any) -> str:
    """What transformers writes of the messages in the form that the template is for."""
    given = []
    for message in messages:
        message = dict(message)
        if "tool_calls" in message:
            arguments = message["tool_calls"][0]["function"]["arguments"]
            form = json.dumps(arguments) if name in AS_TEXT else arguments
            message["tool_calls"] = [{"type": "function", "function": {"name": "weather", "arguments": form}}]
            message["content"] = message.get("content") or CONTENTS[name]
        given.append(message)
    return tokenizer.apply_chat_template(given, tools=[WEATHER], tokenize=False, **more)


def learnt(tokenizer: Any, rows: Any, row: int = 0) -> str:
    ids = [t for t, inside in zip(rows.tokens[row], rows.loss_mask[row], strict=True) if inside]
    return tokenizer.decode(ids)


SPELLINGS: dict[str, Any] = {
    "absent": {"role": "assistant", "tool_calls": [CALL]},
    "null": {"role": "assistant", "content": None, "tool_calls": [CALL]},
    "empty": CALLS,
    "parts": CALLS | {"content": [{"type": "text", "text": ""}]},
    "bare": CALLS | {"tool_calls": [CALL["function"]]},
    "text of arguments": CALLS
    | {"tool_calls": [{"function": {"name": "weather", "arguments": '{"city":"Oslo","unit":null}'}}]},
    "text of calls": CALLS | {"tool_calls": json.dumps([CALL])},
}
OFFERED = {
    "list": [WEATHER],
    "text": json.dumps([WEATHER]),
    "texts": [json.dumps(WEATHER)],
}


@pytest.mark.parametrize("offered", OFFERED)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_call_is_learnt_however_it_is_spelt(way, config, write, spelling, offered):
    name, tokenizer = way
    messages = [ASK, SPELLINGS[spelling], RAIN, YES]
    source = write([{"messages": messages, "tools": OFFERED[offered]}])
    rows = load_sft(config(max_length=2048), source, tokenizer, train_on="completion")
    whole = theirs(name, tokenizer, MESSAGES)
    assert tokenizer.decode(rows.tokens[0]) == whole.removesuffix("\n")
    first = whole[len(theirs(name, tokenizer, MESSAGES[:1], add_generation_prompt=True)) :].partition("<|im_end|>")[0]
    assert "weather" in first
    assert "Oslo" in first
    assert learnt(tokenizer, rows) == f"{first}<|im_end|>{YES['content']}<|im_end|>"


def test_content_beside_a_call_is_learnt_with_it(qwen, config, write):
    said = CALLS | {"content": "I will look."}
    source = write([{"messages": [ASK, said], "tools": [WEATHER]}])
    rows = load_sft(config(max_length=2048), source, qwen, train_on="completion")
    call = '<call>\n{"name": "weather", "arguments": {"city": "Oslo", "unit": null}}\n</call>'
    assert learnt(qwen, rows) == f"I will look.{call}<|im_end|>"


def test_a_bare_definition_is_given_as_it_is(qwen, config, write):
    bare = WEATHER["function"]
    prompts = load_prompts(config(max_length=2048), write([{"prompt": [ASK], "tools": [bare]}]), qwen)
    expected = qwen.apply_chat_template([ASK], tools=[bare], tokenize=False, add_generation_prompt=True)
    assert qwen.decode(prompts.tokens[0]) == expected


WORSE = {"role": "assistant", "content": "No."}


def test_every_stage_sees_the_tools(way, config, write):
    name, tokenizer = way
    settings = config(max_length=2048)
    prompt, tools = MESSAGES[:3], {"tools": [WEATHER]}
    asked = theirs(name, tokenizer, prompt, add_generation_prompt=True)
    yes, no = f"{asked}{YES['content']}<|im_end|>", f"{asked}{WORSE['content']}<|im_end|>"
    both = {"chosen": [YES], "rejected": [WORSE]}
    several = {"completions": [[YES], [WORSE]], "ranks": [0, 1]}
    for row in (
        {"prompt": prompt} | both,
        {"chosen": [*prompt, YES], "rejected": [*prompt, WORSE]},
        {"prompt": prompt} | several,
    ):
        source = write([row | tools])
        ranked, texts = load_rankings(settings, source, tokenizer), load_texts(settings, source, tokenizer)
        for rows in (ranked, texts):
            assert [tokenizer.decode(rows.tokens[i]) for i in range(2)] == [yes, no]
        assert texts.shown[1] == {"prompt": texts.shown[0]["prompt"], "tools": [WEATHER], "completion": [WORSE]}
    sft = (
        {"prompt": prompt, "completion": [YES]},
        {"prompt": prompt, "completion": YES["content"]},
        {"prompt": prompt} | both,
    )
    for row in sft:
        source = write([row | tools])
        rows = load_sft(settings, source, tokenizer, train_on="completion")
        assert tokenizer.decode(rows.tokens[0]) == yes
        assert learnt(tokenizer, rows) == YES["content"] + "<|im_end|>"
    for row in ({"prompt": prompt}, {"messages": MESSAGES}):
        prompts = load_prompts(settings, write([row | tools]), tokenizer)
        assert tokenizer.decode(prompts.tokens[0]) == asked
        assert prompts.shown[0]["tools"] == [WEATHER]
        again = load_prompts(settings, write([prompts.shown[0]], "shown.jsonl"), tokenizer)
        assert again.tokens[0].tolist() == prompts.tokens[0].tolist()
        before, after = Encoder(tokenizer).encode_sample(
            prompts.shown[0]["prompt"], YES["content"], stopped=True, tools=prompts.shown[0]["tools"]
        )
        assert tokenizer.decode(before + after) == yes


def test_a_row_without_tools_is_as_it_was(qwen, plain, config, write):
    for none in ([], None, "", "[]", "null"):
        source = write([{"messages": [ASK, YES], "tools": none}])
        for tokenizer in (qwen, plain):
            rows = load_sft(config(), source, tokenizer, train_on="completion")
            assert tokenizer.decode(rows.tokens[0]) == tokenizer.apply_chat_template([ASK, YES], tokenize=False).strip()


FORGETS_ARGUMENTS = QWEN.replace("{{- f.arguments | tojson }}", "{{- '{}' }}")
FORGETS_RESULTS = QWEN.replace("m.content | tojson", "'...'")
TAKES_NO_TOOLS = "tools: the chat template takes no tools, so the model would not see them"


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (CHATML, {"messages": [ASK, YES], "tools": [WEATHER]}, TAKES_NO_TOOLS),
        # The name of the function stands in the call.
        (QWEN.replace("if tools", "if false"), {"messages": MESSAGES, "tools": [WEATHER]}, TAKES_NO_TOOLS),
        (CHATML, {"messages": MESSAGES}, "COLUMN: the chat template leaves out a tool call or its arguments"),
        (FORGETS_ARGUMENTS, {"messages": MESSAGES}, "COLUMN: the chat template leaves out a tool call or its arg"),
        (FORGETS_ARGUMENTS, {"prompt": MESSAGES[:3]}, "COLUMN: the chat template leaves out a tool call or its arg"),
        (FORGETS_RESULTS, {"messages": MESSAGES}, "COLUMN: the chat template leaves out or changes what a message"),
    ],
)
def test_what_a_template_does_not_write_is_refused(make_tokenizer, config, write, template, row, message):
    tokenizer, source = made(make_tokenizer, template), write([row])
    doors: dict[str, Any] = {"prompt": load_prompts}
    if "messages" in row:
        doors = {"messages": lambda *given: load_sft(*given, train_on="completion"), "completion": load_texts}
    for column, load in doors.items():
        with pytest.raises(DataError) as error:
            load(config(), source, tokenizer)
        assert str(error.value).startswith(f"{source}:1: {message.replace('COLUMN', column)}")


def test_tools_beside_a_plain_text_are_refused(qwen, config, write):
    rows = [{"prompt": "Q", "completion": "A"}, {"prompt": "Q", "chosen": "A", "rejected": "B"}, {"prompt": "Q"}]
    doors = [lambda *given: load_sft(*given, train_on="completion"), load_rankings, load_prompts]
    for row, load in zip(rows, doors, strict=True):
        with pytest.raises(DataError, match="tools: need a chat template, but the row is plain text"):
            load(config(), write([row | {"tools": [WEATHER]}]), qwen)


def test_a_template_of_its_own_for_tools(make_tokenizer, config, write):
    """Some models have two; transformers takes ``tool_use`` where there are tools."""
    tokenizer = made(make_tokenizer, {"default": CHATML, "tool_use": QWEN})  # pyright: ignore[reportArgumentType]
    source = write([{"messages": MESSAGES, "tools": [WEATHER]}, {"messages": [ASK, YES]}])
    rows = load_sft(config(max_length=2048), source, tokenizer, train_on="completion")
    assert tokenizer.decode(rows.tokens[0]) == theirs("qwen", tokenizer, MESSAGES).strip()
    assert tokenizer.decode(rows.tokens[1]) == tokenizer.apply_chat_template([ASK, YES], tokenize=False).strip()


def test_a_stop_token_in_arguments_would_end_the_answer(qwen):
    call = {"function": {"name": "weather", "arguments": {"city": "Os<|im_end|>lo"}}}
    row = parse_sft({"messages": [ASK, CALLS | {"tool_calls": [call]}]})
    with pytest.raises(BadRow, match=r"an answer contains a stop token, which would end it: <\|im_end\|> in message 1"):
        Encoder(qwen).segments(row, every_turn=False)


def test_what_arrow_fills_in_is_no_argument(qwen, config, tmp_path):
    """A column of structs has the fields of all rows; in JSON null is what somebody wrote."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for name, arguments in (("weather", {"city": "Oslo"}), ("count", {"to": 3})):
        tool = {
            "type": "function",
            "function": {"name": name, "parameters": {"properties": {next(iter(arguments)): {"type": "any"}}}},
        }
        calls = CALLS | {"tool_calls": [{"function": {"name": name, "arguments": arguments}}]}
        rows.append({"messages": [ASK, calls, {"role": "tool", "content": "ok", "name": name}, YES], "tools": [tool]})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    loaded = load_sft(config(max_length=2048), str(tmp_path / "rows.parquet"), qwen, train_on="completion")
    first, second = learnt(qwen, loaded, 0), learnt(qwen, loaded, 1)
    assert '"arguments": {"city": "Oslo"}' in first
    assert '"arguments": {"to": 3}' in second
    for row in (0, 1):
        assert "null" not in qwen.decode(loaded.tokens[row])
    assert without_fill({"meta": {"a": None}, "tools": None}) == {"meta": {"a": None}, "tools": None}


BAD = [
    (
        {"messages": [ASK | {"tool_calls": [CALL]}, YES]},
        "messages[0].tool_calls: only an assistant calls tools, not user",
    ),
    ({"messages": [ASK, CALLS | {"tool_calls": 5}]}, "messages[1].tool_calls: expected a list of calls, found int"),
    ({"messages": [ASK, CALLS | {"tool_calls": [{"name": ""}]}]}, "messages[1].tool_calls[0]: expected a call"),
    (
        {"messages": [ASK, CALLS | {"tool_calls": [{"name": "f", "arguments": [1]}]}]},
        "messages[1].tool_calls[0].arguments: expected an object, found list",
    ),
    ({"messages": [ASK, CALLS | {"tool_calls": "{"}]}, "messages[1].tool_calls: is not valid JSON"),
    ({"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": []}]}, "messages[1].content: is empty"),
    ({"messages": [ASK, CALLS | {"content": None, "tool_calls": "[]"}]}, "messages[1].content: expected a string"),
    (
        {"messages": [ASK, YES | {"function_call": {"name": "weather", "arguments": "{}"}}]},
        'messages[1].function_call: is an outdated form; use "tool_calls"',
    ),
    ({"messages": [ASK, YES], "tools": "weather"}, "tools: is not valid JSON"),
    ({"messages": [ASK, YES], "tools": 3}, "tools: expected a list of functions, found int"),
    ({"messages": [ASK, YES], "tools": [{"type": "web_search"}]}, "tools[0]: expected a function"),
]


@pytest.mark.parametrize("nothing", [None, "", " ", "[]", "null", []])
def test_no_tools_and_no_calls_however_they_are_spelt(nothing):
    row = {"messages": [ASK | {"tool_calls": nothing}, YES | {"tool_calls": nothing}], "tools": nothing}
    assert parse_sft(row) == Example(None, [ASK, YES])


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_tools_and_calls(row, message):
    for parse in (parse_sft, parse_answers):
        with pytest.raises(BadRow) as error:
            parse(row)
        assert str(error.value).startswith(message)


def test_the_same_call_is_the_same_answer():
    chosen, rejected = [SPELLINGS["null"]], [SPELLINGS["text of arguments"]]
    ranking = parse_ranking(
        {"prompt": [ASK], "chosen": [ASK, *chosen, RAIN, YES], "rejected": [ASK, *rejected, RAIN, WORSE]}
    )
    assert ranking.completions == [[YES], [WORSE]]
    assert parse_prompt({"messages": MESSAGES}) == MESSAGES[:3]
    assert parse_sft({"messages": MESSAGES, "tools": [WEATHER]}) == Example(None, MESSAGES, [WEATHER])
