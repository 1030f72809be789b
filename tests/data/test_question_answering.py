"""Questions with answers: the answer's tokens are those of its characters, only contexts are cut, all questions about a
text lie on one side, and what is left out is counted."""

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import auxin.data.question_answering as answering
from auxin.data.answer_encoder import CUT_OFF, NO_ROOM, NO_TOKEN, AnswerEncoder
from auxin.data.collecting import CONFLICT, document_key, is_validation
from auxin.data.dataset import DATASETS
from auxin.data.padding import padding_tokenizer
from auxin.data.question_answering import QuestionData, prepare
from auxin.data.question_source import ELSEWHERE, NO_ANSWER, NOT_THERE, Question, QuestionAnsweringSettings
from auxin.errors import ConfigError, DataError
from labelled import question_rows, write_rows
from tiny_tokenizers import KINDS, tiny_tokenizer

ROWS = question_rows(60)
WORDS = ["season", "light", "tree", "leaf", "worst", "best", "hope", "found", "the", "of", "name"]
"""That every tiny tokenizer spells without an unknown token."""


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    for kind in KINDS:
        tiny_tokenizer(kind).save_pretrained(root / kind)
    return {path.name: path for path in root.iterdir()}


def asked(path: Path, rows: list[Any] = ROWS, **changes: Any) -> QuestionAnsweringSettings:
    values = {"paths": [str(write_rows(path, rows))], "vocab_size": 400, "context_length": 32}
    return QuestionAnsweringSettings.parse({**values, "validation_fraction": 0.3, **changes})


def samples_of(data: QuestionData) -> list[tuple[str, str, str, str]]:
    """(split, question with special tokens, context, answer) of every sample, decoded."""
    tokenizer, found = data.tokenizer(), []
    for name in ("train", "validation"):
        split = data.split(name)
        batch = split.rows(range(len(split)))
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())
        for row in range(len(split)):
            ids, context = batch["input_ids"][row], batch["context_mask"][row].bool()
            start, end = int(batch["start_positions"][row]), int(batch["end_positions"][row])
            assert context[start : end + 1].all()
            first = int(context.nonzero()[0])
            parts = (ids[:first], ids[context], ids[start : end + 1])
            found.append((name, *(tokenizer.decode(part) for part in parts)))
    return found


def test_every_question_is_there_with_its_answer_on_the_side_that_its_context_decides(tmp_path: Path) -> None:
    # Half of the questions are asked twice of one context.
    rows = [*ROWS, *({**row, "question": f"{row['question']} word"} for row in ROWS[:30])]
    wanted = asked(tmp_path / "a.jsonl", rows)
    data = prepare(wanted, tmp_path / "data")
    found = samples_of(data)
    assert len(found) == len(rows) == data.report.documents
    sides = {
        row["context"]: "validation" if is_validation(document_key(row["context"].encode(), 0), wanted) else "train"
        for row in rows
    }
    end = data.tokenizer().eos_token
    expected = Counter((sides[row["context"]], row["question"] + end, row["context"], row["answer"]) for row in rows)
    assert Counter((side, asked_, context, answer.strip()) for side, asked_, context, answer in found) == expected
    assert set(sides.values()) == {"train", "validation"}
    form = data.form
    assert (form.unit, form.units, form.length, form.labels) == ("example", 1, 32, None)
    assert form.tensors == ("input_ids", "attention_mask", "context_mask", "start_positions", "end_positions")
    assert data.bytes_per_unit is None
    assert DATASETS.find("question_answering").settings is QuestionAnsweringSettings
    assert wanted.form().tensors == form.tensors
    data.verify()


@settings(deadline=None, max_examples=80)
@given(
    kind=st.sampled_from(KINDS),
    words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=12),
    ends=st.tuples(st.integers(0, 11), st.integers(0, 11)),
    gaps=st.lists(st.sampled_from([" ", "  ", ", ", ". "]), min_size=12, max_size=12),
)
def test_the_tokens_of_an_answer_of_whole_words_are_its_text(kind, words, ends, gaps) -> None:
    tokenizer = tiny_tokenizer(kind)
    first, last = sorted(end % len(words) for end in ends)
    parts = [word + gap for word, gap in zip(words, gaps, strict=False)]
    starts = [sum(map(len, parts[:number])) for number in range(len(parts) + 1)]
    context, start = "".join(parts).rstrip(), starts[first]
    answer = context[start : starts[last] + len(words[last])]
    found = encoded(kind, [Question("the best", context, start, start + len(answer), 1)])[0]
    begin, end = found.answer
    told = tokenizer.decode(found.padded.ids[begin : end + 1])

    def plain(text: str) -> str:
        """Without blanks, which tokenizers add, drop or leave between words and points."""
        return "".join(text.split())

    assert plain(told) == plain(answer)
    assert found.context[0] <= begin <= end < found.context[1]


def encoded(kind: str, questions: list[Question], length: int = 200) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        tiny_tokenizer(kind).save_pretrained(folder)
        return list(AnswerEncoder(padding_tokenizer(Path(folder)), length).answers(questions))


@settings(deadline=None, max_examples=80)
@given(
    kind=st.sampled_from(KINDS),
    context=st.text(st.sampled_from("abet lü1.,é🙂'"), min_size=3, max_size=40).filter(str.strip),
    ends=st.tuples(st.integers(0, 39), st.integers(0, 39)),
)
def test_an_answer_is_the_tokens_that_hold_a_character_of_it(kind, context, ends) -> None:
    """As the tokenizer itself finds the token of a character, whatever the answer cuts through."""
    start, last = sorted(end % len(context) for end in ends)
    question = "the tree"
    (found,) = encoded(kind, [Question(question, context, start, last + 1, 1)])
    # The encoding that the sample is made of; what is compared are places of characters.
    with tempfile.TemporaryDirectory() as folder:
        tiny_tokenizer(kind).save_pretrained(folder)
        whole = AnswerEncoder(padding_tokenizer(Path(folder)), 200)._backend.encode(question, context)
    places = {whole.char_to_token(place, 1) for place in range(start, last + 1)} - {None}
    if not places:
        assert found == NO_TOKEN
    else:
        assert found.padded.ids[: found.padded.tokens] == whole.ids
        # A character of several tokens belongs to each of them, of which the tokenizer names one.
        same = {
            place
            for place, (kind_, span) in enumerate(zip(whole.sequence_ids, whole.offsets, strict=True))
            if kind_ == 1 and span[0] < last + 1 and span[1] > start
        }
        assert places <= same
        assert found.answer == (min(same), max(same))


@pytest.mark.parametrize("length", [64, 24, 20])
def test_a_pair_is_as_run_qa_makes_it(tmp_path: Path, tokenizers: dict[str, Path], length: int) -> None:
    """[CLS] question [SEP] context [SEP], the context alone cut, positions as by transformers' own way."""
    data = prepare(
        asked(tmp_path / "a.jsonl", tokenizer=str(tokenizers["wordpiece"]), context_length=length), tmp_path / "data"
    )
    names = ("input_ids", "attention_mask", "token_type_ids", "start_positions", "end_positions")
    assert set(data.form.tensors) == {*names, "context_mask"}
    tokenizer, expected, cut_off, cut = tiny_tokenizer("wordpiece"), Counter(), 0, 0
    for row in ROWS:
        pair = tokenizer(
            row["question"], row["context"], truncation="only_second", max_length=length, padding="max_length"
        )
        start, end = (pair.char_to_token(0, row["start"] + place, 1) for place in (0, len(row["answer"]) - 1))
        if start is None or end is None:
            cut_off += 1
            continue
        cut += len(tokenizer(row["question"], row["context"])["input_ids"]) > length
        ids, mask, types = (pair[name] for name in ("input_ids", "attention_mask", "token_type_ids"))
        expected[(*ids, *mask, *types, start, end)] += 1
    found = Counter()
    for name in ("train", "validation"):
        batch = data.split(name).rows(range(len(data.split(name))))
        for row in zip(*(batch[key].tolist() for key in names), strict=True):
            found[tuple(number for part in row for number in (part if isinstance(part, list) else [part]))] += 1
        ids, context = batch["input_ids"], batch["context_mask"].bool()
        assert not (context & ((ids == tokenizer.sep_token_id) | (ids == tokenizer.pad_token_id))).any()
        kept = batch["token_type_ids"].sum(1) - context.sum(1)
        assert (kept == 1).all(), "the second [SEP] is no part of the context"
    assert found == expected
    report = data.report
    assert report.train.left_out.get(CUT_OFF, 0) + report.validation.left_out.get(CUT_OFF, 0) == cut_off
    assert (cut_off > 0) == (length < 64)
    assert report.train.cut + report.validation.cut == cut
    told = data.describe()
    assert told["examples"] == str(len(ROWS) - cut_off)
    assert (f"{cut_off} for their length: {CUT_OFF}" in told["left out"]) == (cut_off > 0)
    assert f"{cut} contexts cut to it" in told["context length"]


def test_questions_are_never_cut_and_long_texts_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    context = "the leaf " * 50 + "tree"
    place = len(context) - 4
    questions = [
        Question("the best " * 30, "tree", 0, 4, 1),
        Question("best", context, place, place + 4, 1),
        Question("best", context, 4, 8, 1),
        Question("best", "tree \x00", 5, 6, 1),
    ]
    for kind in ("wordpiece", "byte_level"):
        whole = encoded(kind, questions, 20)
        assert whole[:2] == [NO_ROOM, CUT_OFF]
        assert (whole[2].padded.is_cut, whole[2].padded.tokens) == (True, 20)
        with monkeypatch.context() as less:
            less.setattr("auxin.data.padding._ENOUGH", 30)
            assert encoded(kind, questions, 20) == whole
    # A character that the tokenizer drops is no token.
    assert encoded("wordpiece", questions, 20)[3] == NO_TOKEN


SQUAD = [
    {
        "question": row["question"],
        "context": row["context"],
        "answers": {"text": [row["answer"]], "answer_start": [row["start"]]},
    }
    for row in ROWS
]


def test_all_forms_of_rows_are_read_alike(tmp_path: Path) -> None:
    """Flat fields, with the answer's start or without, SQuAD's mapping, CSV, Parquet and Hugging Face datasets."""
    common = {"vocab_size": 400, "context_length": 32, "validation_fraction": 0.3}
    found = [asked(tmp_path / "a.jsonl"), asked(tmp_path / "a.jsonl", answer_start_field="start")]
    found.append(asked(tmp_path / "squad.jsonl", SQUAD, answer_field="answers"))
    single = [{**row, "answers": {"text": row["answers"]["text"][0]}} for row in SQUAD]
    found.append(asked(tmp_path / "single.jsonl", single, answer_field="answers"))
    several = [
        {**row, "answers": {name: [*values, *values] for name, values in row["answers"].items()}} for row in SQUAD
    ]
    found.append(asked(tmp_path / "several.jsonl", several, answer_field="answers"))
    lines = ["question,context,answer,start"]
    lines += [f'"{row["question"]}","{row["context"]}",{row["answer"]},{row["start"]}' for row in ROWS]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    csv = QuestionAnsweringSettings(paths=(tmp_path / "a.csv",), answer_start_field="start", **common)
    # As a column with gaps is written, and as people write lines; what lies in a gap is looked for.
    numbers = [{**row, "start": float(row["start"]) if n else None} for n, row in enumerate(ROWS)]
    found.append(asked(tmp_path / "gaps.jsonl", numbers, answer_start_field="start"))
    lines = [
        lines[0],
        *(f"{line[: line.rindex(',')]}, {row['start']}.0" for line, row in zip(lines[1:], ROWS, strict=True)),
    ]
    lines[1] = f"{lines[1][: lines[1].rindex(',')]},"
    (tmp_path / "gaps.csv").write_text("\n".join(lines))
    gaps = QuestionAnsweringSettings(paths=(tmp_path / "gaps.csv",), answer_start_field="start", **common)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(SQUAD), tmp_path / "a.parquet")
    parquet = QuestionAnsweringSettings(paths=(tmp_path / "a.parquet",), answer_field="answers", **common)
    (tmp_path / "hub").mkdir()
    write_rows(tmp_path / "hub" / "train.jsonl", SQUAD)
    hub = QuestionAnsweringSettings(source="huggingface", name=str(tmp_path / "hub"), answer_field="answers", **common)
    prints = [prepare(one, tmp_path / str(n)).fingerprint for n, one in enumerate([*found, csv, gaps, parquet, hub])]
    assert len(set(prints)) == 1


def test_an_answer_is_looked_for_as_a_word_first(tmp_path: Path) -> None:
    rows = [
        {"question": "a", "context": "concatenate the cat with a cat", "answer": "cat"},
        {"question": "b", "context": "concatenate and duplicate", "answer": "cat"},
        {"question": "c", "context": "the cat, and the cat", "answer": "cat", "start": 17},
        # The second place begins within the first.
        {"question": "d", "context": "la la la", "answer": "la la"},
    ]
    data = prepare(asked(tmp_path / "a.jsonl", [*ROWS, *rows], answer_start_field=None), tmp_path / "data")
    spooled = {row.name: json.loads(row.data) for row in answering.question_documents(data.settings)}
    starts = [values[2:] for name, values in spooled.items() if values[0] in "abcd"]
    assert starts == [[16, 19, 2], [3, 6, 2], [4, 7, 2], [0, 5, 2]]
    assert data.report.train.repeated + data.report.validation.repeated == 4
    assert data.describe()["answers at several places"] == "4, of which the first is taken"
    known = asked(tmp_path / "b.jsonl", [*ROWS, rows[2]], answer_start_field="start")
    assert [json.loads(row.data)[2:] for row in answering.question_documents(known)][-1] == [17, 20, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_blanks_around_an_answer_are_no_part_of_it(tmp_path: Path, tokenizers: dict[str, Path], kind: str) -> None:
    """The next word's token begins with the blank before it, which would make it one of the answer's."""
    context, answer = "the best tree of the season", "tree"
    spelled = [answer, f"{answer} ", f" {answer}", f" {answer} ", f"{answer}\t"]
    rows: list[Any] = [{"question": f"the {n}", "context": context, "answer": text} for n, text in enumerate(spelled)]
    rows += [{**row, "question": f"leaf {n}", "start": context.find(row["answer"])} for n, row in enumerate(rows[:4])]
    others = [{"question": "name", "context": f"{n} light", "answer": "light"} for n in range(20)]
    wanted = asked(tmp_path / "a.jsonl", [{"start": None, **row} for row in rows + others])
    wanted = wanted.model_copy(update={"tokenizer": tokenizers[kind], "answer_start_field": "start"})
    found = samples_of(prepare(wanted, tmp_path / "data"))
    assert [told.strip() for _, _, of, told in found if "tree" in of] == [answer] * len(rows)


def test_answers_that_are_too_long_to_be_found_are_counted(tmp_path: Path) -> None:
    """They are learnt; how many tokens of the tokenizer an answer has nobody sees in the rows."""
    rows = [{**row, "context": f"{row['context']} {'x' * n}y", "answer": "x" * n + "y"} for n, row in enumerate(ROWS)]
    rows = [*ROWS, *rows[30:34]]
    data = prepare(asked(tmp_path / "a.jsonl", rows, context_length=128, vocab_size=257), tmp_path / "data")
    # A token is a byte: answers have 31 to 34.
    assert (
        data.describe()["tokens of the longest answer"] == "34; 4 answers have more than 30, and no measure finds them"
    )
    short = prepare(asked(tmp_path / "b.jsonl"), tmp_path / "b")
    assert "; 0 answers have more" in short.describe()["tokens of the longest answer"]


def test_what_is_skipped_is_counted_and_named(tmp_path: Path) -> None:
    good = SQUAD[0]
    text, start = good["answers"]["text"][0], good["answers"]["answer_start"][0]
    bad = [
        {**good, "question": "q1", "answers": {"text": [], "answer_start": []}},
        {**good, "question": "q2", "answers": None},
        {**good, "question": "q3", "answers": " "},
        {**good, "question": "q4", "answers": "elsewhere"},
        {**good, "question": "q5", "answers": {"text": text, "answer_start": start + 1}},
        {**good, "question": "q6", "answers": {"text": text, "answer_start": 10**6}},
        {**good, "question": " "},
        {**good, "context": 3},
        {"question": "q7", "context": "x"},
        {**good, "answers": good["context"].partition(":")[0]},
        good,
    ]
    data = prepare(asked(tmp_path / "a.jsonl", [*SQUAD, *bad], answer_field="answers"), tmp_path / "data")
    counts = {reason: skipped.count for reason, skipped in data.report.skipped.items()}
    expected = {
        NO_ANSWER: 3,
        NOT_THERE: 1,
        ELSEWHERE: 2,
        "question: empty": 1,
        "context: text field is not a string": 1,
    }
    assert counts == {**expected, "no field 'answers'": 1, CONFLICT: 1}
    assert data.report.duplicates == 1
    assert data.report.skipped[NO_ANSWER].examples[0].endswith("a.jsonl:61")
    assert "3 skipped: no answer" in data.describe()["left out"]


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (ROWS, {"answer_field": "reply"}, "no field 'reply'. Set `answer_field` to one of: answer, context"),
        (ROWS, {"question_field": "ask"}, "no field 'ask'. Set `question_field`"),
        (ROWS, {"context_field": "text"}, "no field 'text'. Set `context_field`"),
        (ROWS, {"answer_start_field": "at"}, "no field 'at'. Set `answer_start_field`"),
        ([{**ROWS[0], "answer": 3}], {}, r"a.jsonl:1: answer is 3, and an answer is text.*Set `answer_field`"),
        (
            [{**ROWS[0], "answer": list(range(10**5))}],
            {},
            r"answer is \[0, 1, .{60,90} \.\.\. \(688,890 characters\), and an answer is text",
        ),
        ([{**ROWS[0], "answer": {"words": "x"}}], {}, "answer is {'words': 'x'}, a mapping that has no text"),
        (SQUAD[:1], {"answer_field": "answers", "answer_start_field": "context"}, "must differ"),
        (
            [{**SQUAD[0], "start": 1}],
            {"answer_field": "answers", "answer_start_field": "start"},
            "answers is a mapping, which says itself where the answer starts. Leave answer_start_field out",
        ),
        (
            [{**ROWS[0], "start": "soon"}],
            {"answer_start_field": "start"},
            "a.jsonl:1: start is 'soon', and has to be the number of the answer's.*or leave answer_start_field out",
        ),
        (
            [{**ROWS[0], "answer": {"text": ["x"], "answer_start": ["soon"]}}],
            {},
            "a.jsonl:1: answer.answer_start is 'soon', and has to be.*or leave it out of the mapping",
        ),
        ([{**ROWS[0], "start": -1}], {"answer_start_field": "start"}, "start is -1, and has to be the number"),
        ([{**ROWS[0], "start": True}], {"answer_start_field": "start"}, "start is true"),
        ([{**ROWS[0], "start": 1.5}], {"answer_start_field": "start"}, "start is 1.5"),
        ([{**ROWS[0], "start": "1.5"}], {"answer_start_field": "start"}, "start is '1.5'"),
        ([{**ROWS[0], "start": float("nan")}], {"answer_start_field": "start"}, "start is nan"),
        # More digits than Python makes a number of.
        ([{**ROWS[0], "start": "9" * 5000}], {"answer_start_field": "start"}, r"start is '9{79} \.\.\. \(5,002 char"),
        ([{**ROWS[0], "answer": ""}], {}, "no usable document: 0 distinct documents .*1 no answer"),
        (ROWS, {"context_length": 4}, r"context_length: with 4 tokens no question of the train split is left \("),
        (ROWS, {"context_length": 3}, "context_length: 3 has no room for 2 special tokens and one of each text"),
        (
            [{**row, "context": ROWS[0]["context"], "answer": ROWS[0]["answer"]} for row in ROWS],
            {},
            "No document fell into the (train|validation) split",
        ),
    ],
)
def test_sources_that_can_not_be_learnt_from(tmp_path: Path, rows: list[Any], changes: dict[str, Any], message: str):
    with pytest.raises((DataError, ConfigError), match=message):
        prepare(asked(tmp_path / "a.jsonl", rows, **changes), tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "stdlib"}, r"source: the standard library's files have no questions\. Set source: files"),
        ({"source": "files"}, "needs `paths`"),
        ({"paths": ["a"], "context_field": "question"}, "must differ; given: question, question, answer"),
        ({"paths": ["a"], "text_field": "question"}, "text_field"),
    ],
)
def test_settings_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuestionAnsweringSettings.parse(values)


def test_a_finished_folder_is_reused_and_damage_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = asked(tmp_path / "a.jsonl")
    first = prepare(wanted, tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr(answering, "_build", lambda *arguments: pytest.fail("built again"))
        assert prepare(wanted, tmp_path / "data").fingerprint == first.fingerprint
    # Texts and answers are the same, an answer's place is not.
    moved = {**ROWS[0], "answer": ROWS[0]["context"].split()[0][:-1]}
    write_rows(tmp_path / "a.jsonl", [moved, *ROWS[1:]])
    with pytest.raises(DataError, match="source has changed"):
        prepare(wanted, tmp_path / "data")
    content = bytearray((first.directory / "train-answers.npy").read_bytes())
    content[-24] ^= 1
    (first.directory / "train-answers.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"train-answers.npy is damaged"):
        QuestionData.load(first.directory).verify()


def test_the_fingerprint_follows_content_and_settings(tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    base = prepare(asked(tmp_path / "a.jsonl"), tmp_path / "base").fingerprint
    same = asked(tmp_path / "b.jsonl", [*reversed(ROWS), ROWS[3]])
    assert prepare(same, tmp_path / "same").fingerprint == base
    changed = {
        "answer": asked(tmp_path / "c.jsonl", [{**ROWS[0], "answer": ROWS[0]["context"].split(":")[0]}, *ROWS[1:]]),
        "length": asked(tmp_path / "a.jsonl", context_length=31),
        "seed": asked(tmp_path / "a.jsonl", seed=1),
        "tokenizer": asked(tmp_path / "a.jsonl", tokenizer=str(tokenizers["wordpiece"])),
    }
    prints = {name: prepare(value, tmp_path / f"x-{name}").fingerprint for name, value in changed.items()}
    assert len({base, *prints.values()}) == len(prints) + 1
