"""A model folder, a plan and a recipe are data: nothing of them runs, nothing is fetched, nothing outside is read."""

import json
import os
import pty
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig

from auxin.data.tokenizer import read_tokenizer
from auxin.edits import ChangeArchitecture, ConfigureModule, Plan, SetConfig, apply
from auxin.edits.folder_executor import apply_to_checkpoint
from auxin.edits.structure import config_from_values, config_values
from auxin.errors import AuxinError, CheckpointError, ConfigError, DataError, PlanError
from auxin.foreign import lies_outside, offline
from auxin.models.configs import edited_config
from auxin.models.loading import load_config, load_model
from auxin.recipes import price_recipe, training_recipe
from corpora import write_documents
from tiny_models import tiny
from tiny_tokenizers import tiny_tokenizer

CODE = """
import os
open(os.environ["MARKER"], "a").write(__file__ + "\\n")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
def generate(model, **kwargs):
    return model
"""
AUTO_MAP = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel", "AutoModelForCausalLM": "own.OwnModel"}
# Runs several commands in one process, which is started with the standard input that they are tried with.
DRIVER = """
import json, os, sys
from transformers.integrations import hub_kernels
from auxin import cli

def fetched(*args, **kwargs):
    open(os.environ["MARKER"], "a").write(f"kernel {args}\\n")
    raise RuntimeError("fetched")

hub_kernels.get_kernel, hub_kernels.is_kernels_available = fetched, lambda: True
for words in json.loads(sys.argv[1]):
    sys.argv = ["auxin", *words]
    try:
        cli.main()
    except SystemExit as exit:
        sys.stderr.write(f"@@ {exit.code or 0}\\n")
    sys.stderr.flush()
"""


def saved(folder: Path, **values: object) -> Path:
    """A tiny Llama with a tokenizer, whose config.json says `values`, too."""
    tokenizer = tiny_tokenizer("byte_level")
    tiny("llama", dtype=torch.float32, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    say(folder, **values)
    return folder


def say(folder: Path, name: str = "config.json", **values: object) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def with_code(folder: Path, **values: object) -> Path:
    """A folder with code for config, model, tokenizer and generation."""
    saved(folder, auto_map=AUTO_MAP, **values)
    say(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]})
    (folder / "own.py").write_text(CODE)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE)
    return folder


class _Server:
    """Stands for the Hub and counts who asks."""

    def __init__(self) -> None:
        asked = self.asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(404)
                self.end_headers()

            do_HEAD = do_GET

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hub():
    server = _Server()
    yield server
    server.close()


def test_no_command_asks_runs_or_fetches_anything(tmp_path, hub):
    """On a terminal where somebody says yes to all that is asked, and without one."""
    own = with_code(tmp_path / "own", model_type="own")
    known = with_code(tmp_path / "known")
    kernel = saved(tmp_path / "kernel", attn_implementation="org/kernel")
    backbone = tmp_path / "backbone"
    backbone.mkdir()
    (backbone / "config.json").write_text(json.dumps({"model_type": "dpt", "backbone": "resnet50"}))
    texts = write_documents(tmp_path / "texts")
    (tmp_path / "plan.yaml").write_text("method: none\npromise: exact\nedits:\n- {kind: set_config, values: {}}\n")
    master, slave = pty.openpty()
    os.write(master, b"y\n" * 50)
    runs = {}
    for name, standard_input in (("terminal", slave), ("none", subprocess.DEVNULL)):
        calls = [
            *(
                call
                for folder in (own, known, kernel)
                for call in commands(folder, texts, tmp_path / "plan.yaml", name)
            ),
            ["show", str(backbone)],
        ]
        environment = {**os.environ, "MARKER": str(tmp_path / "ran"), "HF_ENDPOINT": hub.url}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
        runs[name] = subprocess.Popen(
            [sys.executable, "-c", DRIVER, json.dumps(calls)],
            stdin=standard_input,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
    for name, run in runs.items():
        said, _ = run.communicate(timeout=600)
        codes = [int(line[3:]) for line in said.splitlines() if line.startswith("@@ ")]
        assert "y/N" not in said, name
        assert "Traceback" not in said, said
        assert codes[5:10] == [0] * 5, said  # of this one transformers has the code itself
        assert all(codes[:5] + codes[10:]), said
        assert len(codes) == 16
        assert "auto_map names code of the model's own, which is not run" in said
        assert "'org/kernel' is no implementation" in said
        assert "names something on the Hub, and nothing is fetched" in said
    os.close(master)
    os.close(slave)
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
    assert hub.asked == []


def commands(folder: Path, texts: Path, plan: Path, name: str) -> list[list[str]]:
    """Those that read a model."""
    model, output = str(folder), str(folder.with_name(f"{folder.name} {name}"))
    settings = ["--set", "training.tensorboard=false", "--set", "data.validation_fraction=0.2"]
    sizes = ["--steps", "1", "--batch-size", "2", "--context-length", "16"]
    return [
        ["show", model],
        ["apply", model, str(plan), "-o", output],
        ["evaluate", model, "--text", str(next(texts.iterdir()))],
        ["generate", model, "the age", "--max-new-tokens", "2"],
        ["train", "--model", model, "--corpus", str(texts), *sizes, *settings, "-o", f"{output} run"],
    ]


ACTIVE = [
    ({"attn_implementation": "org/kernel"}, "attn_implementation: 'org/kernel'"),
    ({"_attn_implementation": "org/kernel@v1:function"}, "_attn_implementation"),
    ({"_attn_implementation": {"": "eager", "text_config": "org/kernel"}}, "_attn_implementation"),
    ({"attn_implementation": "paged|org/kernel"}, "attn_implementation"),
    ({"attn_implementation": "flash_attention_2"}, "attn_implementation"),
    ({"experts_implementation": "sonicmoe"}, "experts_implementation"),
    ({"_experts_implementation": "org/kernel"}, "_experts_implementation"),
    ({"text_config": {"_attn_implementation": "org/kernel"}}, "text_config._attn_implementation"),
    ({"per_layer_config": {"0": {"attn_implementation": "org/kernel"}}}, "per_layer_config.0.attn_implementation"),
    ({"backbone": "org/model"}, "backbone"),
    ({"backbone_config": {"model_type": "timm_backbone", "backbone": "hf-hub:org/model"}}, "backbone_config.backbone"),
    ({"architecture": "hf-hub:org/model"}, "architecture"),
    ({"model_args": {"checkpoint_path": "evil.pth"}}, "model_args.checkpoint_path"),
    ({"timm_kwargs": {"pretrained": True}}, "timm_kwargs.pretrained"),
    ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
    ({"configuration_files": ["../config.4.0.0.json"]}, "configuration_files"),
]


@pytest.mark.parametrize(("values", "named"), ACTIVE, ids=lambda value: value if isinstance(value, str) else "")
def test_a_config_that_names_code_or_files_elsewhere_is_refused_by_the_value(values, named, tmp_path):
    folder = saved(tmp_path, **values)
    with pytest.raises(CheckpointError, match=r"config\.json: " + named.replace(".", r"\.")):
        load_config(folder)
    with pytest.raises(PlanError, match="made_for: " + named.replace(".", r"\.")):
        config_from_values({**config_values(LlamaConfig()), **values})


def test_what_transformers_has_within_itself_may_be_named(tmp_path):
    folder = saved(tmp_path, attn_implementation="eager", _attn_implementation_autoset=True, _name_or_path="org/model")
    assert load_config(folder)._attn_implementation == "eager"
    assert load_model(folder) is not None


def test_classes_may_be_called_anything(tmp_path):
    labels = {"id2label": {0: "backbone", 1: "a/b"}, "label2id": {"backbone": 0, "transformers_weights": 1}}
    config = edited_config(load_config(saved(tmp_path)), labels)
    assert config.label2id == labels["label2id"]
    say(tmp_path, **labels)
    assert load_config(tmp_path).label2id == labels["label2id"]


def test_an_adapter_of_the_folder_imports_nothing_by_name(tmp_path):
    folder = saved(tmp_path)
    (folder / "adapter_config.json").write_text(json.dumps({"megatron_config": {}, "megatron_core": "antigravity"}))
    with pytest.raises(CheckpointError, match="megatron_config"):
        load_config(folder)


REFUSED = "can't be set|would fetch|makes timm|is no value of a config"
SET = [values for values, _ in ACTIVE] + [
    {"auto_map": {"AutoModel": "own.OwnModel"}},
    {"name_or_path": "org/model"},
    {"_name_or_path": "org/model"},
    {"_commit_hash": "0" * 40},
    {"quantization_config": {"quant_method": "mxfp4"}},
    {"custom_pipelines": {}},
    {"_auto_class": "AutoConfig"},
    {"to_dict": 3},
]


@pytest.mark.parametrize("values", SET, ids=lambda values: next(iter(values)))
def test_a_plan_and_a_recipe_cannot_set_it_either(values, tmp_path, monkeypatch):
    fetched: list[object] = []
    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", lambda *a, **k: fetched.append(a))
    model = tiny("llama")
    for edit in (
        SetConfig(values=values),
        ChangeArchitecture(model_type="mistral", values=values),
        ConfigureModule(module="model.layers.0.mlp", values=values),
    ):
        # A module is asked first whether it has such a value, or does something with it.
        with pytest.raises(PlanError, match=f"{REFUSED}|Edit 1 .*has no (value|effect)"):
            apply(Plan(method="by hand", promise="none", edits=[edit]), model)
    (tmp_path / "config.json").write_text(json.dumps(config_values(LlamaConfig(num_hidden_layers=1))))
    texts = write_documents(tmp_path / "texts")
    overrides = [f"branches.0.stages.0.config.{key}={json.dumps(value)}" for key, value in values.items()]
    with pytest.raises(ConfigError, match=REFUSED):
        price_recipe(
            training_recipe(
                *(str(tmp_path / "config.json"), {"source": "files", "paths": [texts]}, {"steps": 1}, 0, overrides)
            )
        )
    assert not fetched


def test_the_hub_is_not_reached_while_a_folder_is_read_whatever_asks_for_it(tmp_path, monkeypatch, hub):
    from huggingface_hub import HfApi

    folder = saved(tmp_path)
    asked: list[bool] = []
    real = AutoConfig.from_pretrained

    def asking(*arguments, **options):
        with pytest.raises(OSError, match="offline"):
            HfApi(endpoint=hub.url).repo_exists("org/model")
        asked.append(True)
        return real(*arguments, **options)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(AutoConfig, "from_pretrained", asking)
    load_config(folder)
    assert asked
    assert hub.asked == []
    assert constants.HF_HUB_OFFLINE is False
    with offline(), offline():
        pass
    assert constants.HF_HUB_OFFLINE is False


def outside(tmp_path: Path, name: str) -> Path:
    """A file beside the model's folder."""
    path = tmp_path / "elsewhere" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("secret")
    return path


@pytest.mark.parametrize(
    "name", ["notes.txt", "model.safetensors", "config.json", "tokenizer.json", "training/optimizer.safetensors"]
)
def test_no_link_is_followed_out_of_a_folder(name, tmp_path):
    folder, target = saved(tmp_path / "model"), tmp_path / "elsewhere" / Path(name).name
    link = folder / name
    link.parent.mkdir(exist_ok=True)
    if link.exists():
        target.parent.mkdir()
        shutil.move(link, target)
    else:
        outside(tmp_path, target.name)
    link.symlink_to(target)
    with pytest.raises(CheckpointError, match="is a link that leads out of the folder"):
        load_config(folder)
    with pytest.raises(CheckpointError, match="is a link that leads out of the folder"):
        apply_to_checkpoint(Plan(method="none", promise="exact", edits=[]), folder, tmp_path / "new")
    if "/" not in name:
        with pytest.raises(DataError, match="is a link that leads out of the folder"):
            read_tokenizer(folder)
    assert not (tmp_path / "new").exists()


def test_a_folder_is_copied_without_what_its_links_lead_to(tmp_path):
    folder, secret = saved(tmp_path / "model"), outside(tmp_path, "secret")
    below = folder / "extra" / "more"
    below.mkdir(parents=True)
    plan = Plan(method="none", promise="exact", edits=[])
    for target in (secret, secret.parent, "..", "../.."):
        (below / "link").symlink_to(target)
        with pytest.raises(CheckpointError, match="is a link"):
            apply_to_checkpoint(plan, folder, tmp_path / "new")
        (below / "link").unlink()
    (below / "link").symlink_to(folder / "config.json")
    (below / "nowhere").symlink_to("nothing")
    os.mkfifo(below / "pipe")
    with pytest.warns(UserWarning, match="was left out"):
        receipt = apply_to_checkpoint(plan, folder, tmp_path / "new")
    assert [note.partition(" was left out")[0] for note in receipt.notes] == ["extra/more/nowhere", "extra/more/pipe"]
    assert (tmp_path / "new" / "extra" / "more" / "link").read_text() == (folder / "config.json").read_text()


def test_a_snapshot_in_the_cache_of_the_hub_is_a_folder(tmp_path):
    """There every file is a link to a blob beside the snapshots."""
    repository = tmp_path / "models--org--name"
    folder = saved(repository / "snapshots" / "abc")
    (repository / "blobs").mkdir()
    for path in list(folder.iterdir()):
        blob = repository / "blobs" / f"{abs(hash(path.name)):x}"
        shutil.move(path, blob)
        path.symlink_to(Path("../../blobs") / blob.name)
    apply_to_checkpoint(Plan(method="none", promise="exact", edits=[]), folder, tmp_path / "new")
    assert not [path for path in (tmp_path / "new").rglob("*") if path.is_symlink()]
    assert load_file(tmp_path / "new" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    (repository / "blobs" / "leak").symlink_to(outside(tmp_path, "secret"))
    (folder / "leak").symlink_to("../../blobs/leak")
    assert lies_outside(folder / "leak", folder)


@pytest.mark.parametrize("file", ["../elsewhere/w.safetensors", "/etc/passwd"])
def test_an_index_names_no_file_elsewhere(file, tmp_path):
    folder = saved(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "elsewhere").mkdir()
    save_file(tensors, tmp_path / "elsewhere" / "w.safetensors", {"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for attempt in (
        lambda: load_model(folder),
        lambda: apply_to_checkpoint(Plan(method="none", promise="exact", edits=[]), folder, tmp_path / "new"),
    ):
        with pytest.raises(CheckpointError, match="lies outside of the folder"):
            attempt()


def test_modules_of_sentence_transformers_lie_in_the_folder(tmp_path):
    folder = saved(tmp_path / "model")
    (folder / "modules.json").write_text(json.dumps([{"type": "x.Pooling", "path": "../elsewhere"}]))
    from auxin.edits.sentence_modules import _modules

    with pytest.raises(AuxinError, match="lies outside of the folder"):
        _modules(folder)
