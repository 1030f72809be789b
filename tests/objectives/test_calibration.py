"""Calibration data: the training split alone, in the model's own tokens, the same at every pass."""

import re
from dataclasses import replace

import pytest
import torch
from transformers import BertForSequenceClassification

from auxin.data import CorpusSettings, PackedData, prepare
from auxin.data.collecting import document_key, is_validation
from auxin.data.tokenizer import load_tokenizer, train_tokenizer
from auxin.errors import ConfigError, DataError
from auxin.objectives.calibration import Calibration, CalibrationSettings, CorpusCalibration
from auxin.objectives.causal import Causal
from auxin.objectives.masked_language import MaskedLanguage
from auxin.objectives.objective import IGNORED
from auxin.objectives.span_corruption import SpanCorruption
from tiny_models import inputs, labels, tiny
from tiny_tokenizers import tiny_tokenizer

SPANS = SpanCorruption(noise_density=0.3, mean_span_length=2.0)
TEXT = "document {} says that the early bird of number {} catches the worm. "


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        (folder / f"{number}.txt").write_text(TEXT.format(number, number) * 4)
    return folder


@pytest.fixture(scope="module")
def data(corpus, tmp_path_factory):
    settings = CorpusSettings(
        source="files", paths=(corpus,), vocab_size=300, context_length=16, validation_fraction=0.2
    )
    return prepare(settings, tmp_path_factory.mktemp("data") / "data")


def config(family="llama", **values):
    return tiny(family, vocab_size=400, **values).config


def rows(calibration, name="input_ids"):
    return torch.cat([batch[name] for batch in calibration.batches()])


def numbers(data: PackedData, contexts) -> set[int]:
    """The documents that contexts have something of, by their numbers."""
    texts = data.tokenizer().batch_decode(contexts)
    return {int(number) for text in texts for number in re.findall(r"(?:document|number) (\d+) ", text)}


def test_held_out_documents_are_never_among_it(data):
    """Of every document in the training split something is seen, of no other anything."""
    everything = Calibration.of_split(data, config(), CalibrationSettings(samples=2 * len(data.train)))
    seen, held_out = numbers(data, rows(everything)), numbers(data, data.validation)
    assert len(held_out) >= 4
    assert not seen & held_out
    assert seen == numbers(data, data.train)
    assert {tuple(row) for row in rows(everything).tolist()} == {tuple(row) for row in data.train.tolist()}


def test_it_never_opens_the_held_out_split(corpus, data, tmp_path):
    """The same from data whose held-out split is another one."""

    class Closed(PackedData):
        validation = property(lambda self: pytest.fail("the held-out split was read"), lambda self, value: None)

    closed = Closed(data.directory, data.manifest)
    assert len(rows(Calibration.of_split(closed, config()))) == 128


@pytest.mark.parametrize(("samples", "batch_size", "sizes"), [(10, 4, [4, 4, 2]), (3, 8, [3]), (8, 4, [4, 4])])
def test_there_are_as_many_samples_as_asked(data, samples, batch_size, sizes):
    settings = CalibrationSettings(samples=samples, batch_size=batch_size, length=6)
    calibration = Calibration.of_split(data, config(), settings)
    batches = list(calibration.batches())
    assert calibration.samples == samples
    assert [len(batch["input_ids"]) for batch in batches] == sizes
    for batch in batches:
        assert batch["input_ids"].shape[1] == 6
        assert torch.equal(batch["labels"], batch["input_ids"])
        assert batch["input_ids"].device.type == "cpu"
        assert batch["input_ids"].dtype == torch.int64
    # The first tokens of whole contexts.
    begins = {tuple(row[:6]) for row in data.train.tolist()}
    assert {tuple(row) for row in rows(calibration).tolist()} <= begins


def test_every_pass_is_the_same_and_the_seed_decides_it(data):
    def made(run, objective=None, **values):
        family = "t5" if objective else "llama"
        settings = CalibrationSettings(samples=12, batch_size=5, **values)
        return Calibration.of_split(data, config(family), settings, objective, run)

    for objective in (None, SPANS):
        one, again, other = made(1, objective), made(1, objective), made(2, objective)
        first = rows(one)
        assert torch.equal(first, rows(one))
        assert torch.equal(rows(one, "labels"), rows(again, "labels"))
        assert not torch.equal(first, rows(other))
        assert torch.equal(first, rows(made(2, objective, seed=1))), "a seed that is set goes first"
        assert one.fingerprint == again.fingerprint == made(2, objective, seed=1).fingerprint
        assert one.fingerprint != other.fingerprint
    # Two passes at once don't disturb each other.
    one, two = made(1).batches(), made(1).batches()
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, two, strict=True))


def test_the_fingerprint_is_of_data_settings_and_objective(data):
    prints = [
        Calibration.of_split(data, config("t5"), settings, objective).fingerprint
        for settings in (CalibrationSettings(samples=4), CalibrationSettings(samples=5), CalibrationSettings(length=12))
        for objective in (SPANS, SPANS.model_copy(update={"noise_density": 0.4}))
    ]
    prints += [Calibration.of_split(data, config(), CalibrationSettings(samples=4)).fingerprint]
    model = tiny("llama")
    prints += [
        Calibration.of_batches(model, batches).fingerprint
        for batches in (
            [torch.zeros(2, 3, dtype=torch.long)],
            [torch.zeros(3, 2, dtype=torch.long)],
            [torch.ones(2, 3, dtype=torch.long)],
            [torch.zeros(2, 3, dtype=torch.int32)],
            [torch.zeros(1, 3, dtype=torch.long)] * 2,
        )
    ]
    assert len(set(prints)) == len(prints)
    assert all(re.fullmatch("[0-9a-f]{64}", one) for one in prints)


def test_more_samples_than_contexts_are_read_in_another_order(data):
    count = len(data.train)
    calibration = Calibration.of_split(data, config(), CalibrationSettings(samples=2 * count, batch_size=7))
    first, second = rows(calibration)[:count], rows(calibration)[count:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == sorted(data.train.tolist())
    assert not torch.equal(first, second)


def test_an_encoder_decoder_gets_what_is_cut_out_and_pays_for_the_whole_text(data):
    seen = []
    calibration = Calibration.of_split(data, config("t5"), CalibrationSettings(samples=6), SPANS)
    watched = replace(calibration, watch=lambda *size: seen.append(size))
    (batch,) = watched.batches()
    assert seen == [(6, 6 * 16)]
    # 5 of 16 tokens in 2 spans: 11 kept and two sentinels; 5, two sentinels and the end.
    assert batch["input_ids"].shape == (6, 13)
    assert batch["labels"].shape == (6, 8)
    assert (batch["labels"][:, -1] == config("t5").eos_token_id).all()
    sentinels = batch["input_ids"] >= data.vocab_size
    assert (sentinels.sum(dim=1) == 2).all()
    # Without a word on the objective it is the architecture's.
    assert Calibration.of_split(data, config("t5")).objective == SpanCorruption()


def test_what_does_not_fit_is_refused(data):
    def refused(message, config, objective=None, **settings):
        with pytest.raises(ConfigError, match=message):
            Calibration.of_split(data, config, CalibrationSettings(**settings), objective)

    refused(r"length is 17, but the data's context_length is 16", config(), length=17)
    refused(r"max_position_embeddings is 8", config(max_position_embeddings=8))
    refused(r"'span_corruption' is for encoder-decoders", config(), SPANS)
    refused(r"'causal' is for decoders", config("t5"), Causal())
    refused(r"tokenizer has \d+ tokens, but the model's vocab_size is 19", tiny("llama").config)
    with pytest.raises(ConfigError, match="samples"):
        CalibrationSettings.parse({"samples": 0})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    train_tokenizer([TEXT.format(1, 1)] * 3, 300, 32).save_pretrained(folder)
    return folder


def test_a_corpus_is_read_in_the_models_own_tokens(corpus, saved):
    text = CorpusSettings(source="files", paths=(corpus,), validation_fraction=0.2)
    model = tiny("llama", vocab_size=400)
    wanted = CorpusCalibration(samples=30, length=9, corpus=text)
    calibration = Calibration.of_corpus(model, saved, wanted, seed=4)
    prepared = prepare(text.model_copy(update={"tokenizer": saved, "context_length": 9}), saved / "again")
    assert torch.equal(rows(calibration), rows(Calibration.of_split(prepared, model.config, wanted, seed=4)))
    assert not numbers(prepared, rows(calibration)) & numbers(prepared, prepared.validation)
    assert rows(Calibration.of_corpus(model, saved, CorpusCalibration(samples=3, corpus=text))).shape == (3, 32), (
        "no more than the model has positions for"
    )


def test_one_file_serves_since_nothing_held_out_is_read(saved, tmp_path):
    """As in `auxin plan --data corpus.paths=[one.txt]`; by chance it is held out itself, which another seed mends."""
    text = tmp_path / "one.txt"
    text.write_text(TEXT.format(1, 1) * 4)
    seeds = {is_held_out(text, seed): seed for seed in range(200)}
    corpus = CorpusSettings(paths=(text,), seed=seeds[False])
    found = Calibration.of_corpus(tiny("llama", vocab_size=400), saved, CorpusCalibration(samples=6, corpus=corpus))
    document, length = load_tokenizer(saved).encode(text.read_text()), rows(found).shape[1]
    contexts = {tuple(document[start : start + length]) for start in range(0, len(document) - length + 1, length)}
    assert {tuple(row) for row in rows(found).tolist()} == contexts
    assert found.distinct == len(contexts)
    held_out = CorpusCalibration(corpus=corpus.model_copy(update={"seed": seeds[True]}))
    with pytest.raises(DataError, match=r"No document fell into the train split .* or another seed"):
        Calibration.of_corpus(tiny("llama", vocab_size=400), saved, held_out)
    with pytest.raises(DataError, match="No document fell into the validation split"):
        prepare(corpus.model_copy(update={"tokenizer": saved, "context_length": 16}), tmp_path / "run")


def is_held_out(path, seed):
    return is_validation(document_key(path.read_bytes(), seed), CorpusSettings(paths=(path,), seed=seed))


def test_held_out_text_may_be_shorter_than_a_sample(corpus, saved, tmp_path):
    """What a corpus has too little of for comparing models serves to look at one; it is not opened for less."""
    settings = CorpusSettings(paths=(corpus,), tokenizer=saved, context_length=300, validation_fraction=0.05)
    with pytest.raises(DataError, match=r"The validation split has .* less than one context of 300"):
        prepare(settings, tmp_path / "run")
    data = prepare(settings, tmp_path / "looked_at", needed=("train",))
    assert len(data.split("train")) == len(data.train) > 0
    with pytest.raises(DataError, match="without a context in the validation split"):
        data.split("validation")
    wanted = CorpusCalibration(samples=2, corpus=settings)
    model = tiny("llama", vocab_size=400, max_position_embeddings=300)
    assert rows(Calibration.of_corpus(model, saved, wanted)).shape == (2, 300)


def test_text_shorter_than_one_sample_is_refused(saved, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("too short")
    seed = next(seed for seed in range(200) if not is_held_out(text, seed))
    wanted = CorpusCalibration(corpus=CorpusSettings(paths=(text,), seed=seed), length=30)
    with pytest.raises(
        DataError, match=r"The train split has \d+ tokens in 1 documents, less than one context of 30\."
    ):
        Calibration.of_corpus(tiny("llama", vocab_size=400), saved, wanted)


def test_without_a_corpus_it_is_the_standard_library(saved):
    calibration = Calibration.of_corpus(tiny("llama", vocab_size=400, max_position_embeddings=200), saved)
    assert rows(calibration).shape == (128, 128)


def test_a_corpus_without_tokens_or_labels_is_refused(corpus, saved, tmp_path):
    text = CorpusCalibration(corpus=CorpusSettings(source="files", paths=(corpus,)))
    with pytest.raises(DataError, match=r"no data to look at: .*no tokenizer.json.*Save the model with its tokenizer"):
        Calibration.of_corpus(tiny("llama"), tmp_path, text)
    classifier = BertForSequenceClassification(tiny("bert").config)
    with pytest.raises(DataError, match=r"no labels for a BertForSequenceClassification.* batches with labels in Py"):
        Calibration.of_corpus(classifier, saved, text)


def test_a_masked_language_model_names_what_is_hidden_of_the_text(corpus, tmp_path):
    tokenizer = tiny_tokenizer("wordpiece")
    tokenizer.save_pretrained(tmp_path)
    model = tiny("bert", vocab_size=len(tokenizer))
    wanted = CorpusCalibration(samples=3, length=16, corpus=CorpusSettings(paths=(corpus,)))
    calibration = Calibration.of_corpus(model, tmp_path, wanted)
    assert calibration.objective == MaskedLanguage()
    for batch in calibration.batches():
        hidden = batch["labels"] != IGNORED
        assert hidden.sum(1).tolist() == [2] * 3, "15 % of 16"
        assert (batch["input_ids"][hidden] == tokenizer.mask_token_id).any()
        # Documents end with the separator, whose id the model has.
        assert int(batch["input_ids"].max()) < len(tokenizer)


def test_batches_of_ones_own_are_kept_as_they_are():
    model = tiny("bert")
    given = [{**inputs(model, seed), "labels": labels(model, seed)} for seed in range(3)]
    seen = []
    calibration = Calibration.of_batches(model, iter(given))
    calibration = replace(calibration, watch=lambda *size: seen.append(size))
    for _ in range(2):
        for made, batch in zip(calibration.batches(), given, strict=True):
            assert made.keys() == batch.keys()
            assert all(torch.equal(made[name], batch[name]) for name in batch)
    assert (calibration.samples, calibration.settings.batch_size) == (6, 2)
    assert seen == [(2, 14)] * 6
    assert calibration.objective is None


def test_images_have_no_tokens():
    model = tiny("vit")
    seen = []
    calibration = Calibration.of_batches(model, [{**inputs(model), "labels": labels(model)}])
    list(replace(calibration, watch=lambda *size: seen.append(size)).batches())
    assert seen == [(2, 0)]


def test_labels_of_a_causal_model_are_its_inputs_and_others_have_to_be_given():
    model = tiny("gpt2")
    ids = inputs(model)["input_ids"]
    for given in (ids, {"input_ids": ids}):
        (batch,) = Calibration.of_batches(model, [given]).batches()
        assert torch.equal(batch["labels"], ids)
    for family in ("bert", "t5", "vit"):
        with pytest.raises(DataError, match="no labels, without which"):
            Calibration.of_batches(tiny(family), [inputs(tiny(family))])
    with pytest.raises(DataError, match="has no batch"):
        Calibration.of_batches(model, [])


def test_a_corpus_is_a_path_alone_too():
    def corpus(value):
        return CorpusCalibration.parse({"corpus": value}).corpus

    assert corpus("texts") == corpus({"paths": "texts"}) == corpus({"source": "files", "paths": ["texts"]})
    assert corpus("texts").text == "texts"
    with pytest.raises(
        ConfigError, match=r"^corpus: `paths` belongs to source 'files', .* Set source: files, or leave"
    ):
        corpus({"source": "stdlib", "paths": "texts"})
    with pytest.raises(ConfigError, match=r"^corpus: must be a mapping"):
        corpus(3)
