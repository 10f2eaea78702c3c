"""Chats: five templates, what they make of messages, written down, and templates that misbehave.

The texts are what transformers' apply_chat_template gives for these templates and messages (trim_blocks, lstrip_blocks,
add_generation_prompt); llama.cpp's formatter is asked beside them where it is installed.
"""
import json

import numpy as np
import pytest
from conftest import command, real_model

import tinymia
from tinymia_files import chat as files_chat

ROLES = "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
TEMPLATES = {
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
              "'<|im_end|>' "
              "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama-2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
               "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}"
               "{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 "
               "% 2 == 0) "
               "%}" + ROLES + "{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = "
               "'<<SYS>>"
               "\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message["
               "'content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + "
               "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}"
               "{% endif %}{% endfor %}",
    "llama-3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
               "'<|start_header_id|>' "
               "+ message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if "
               "loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if "
               "add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "mistral": "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % "
               "2 == 0) "
               "%}" + ROLES + "{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
               "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}"
               "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + "
              "message['content'] + "
              "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + "
              "eos_token "
              "}}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + "
              "eos_token }}\n"
              "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
              "{% endfor %}",
}
MESSAGES = [{"role": "user", "content": " Hello, you "}, {"role": "assistant", "content": "Hi"},
            {"role": "user", "content": "Who\nare you?"}]
SYSTEM = [{"role": "system", "content": "Be kind."}, *MESSAGES[:1]]
EXPECTED = {
    "chatml": (
        "<|im_start|>user\n Hello, you <|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n<|im_start|>user\nWho\nare you?"
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n Hello, you <|im_end|>\n<|im_start|>assistant\n"),
    "llama-2": (
        "<s>[INST] Hello, you [/INST] Hi </s><s>[INST] Who\nare you? [/INST]",
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n Hello, you [/INST]"),
    "llama-3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nHello, "
        "you<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
        "\n\nHi<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWho\nare "
        "you?<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\n",
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe "
        "kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "Hello, you<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
    "mistral": ("<s>[INST]  Hello, you  [/INST]Hi</s>[INST] Who\nare you? [/INST]", None),     # no system message
    "zephyr": (
        "<|user|>\n Hello, you </s>\n<|assistant|>\nHi</s>\n<|user|>\nWho\nare you?</s>\n<|assistant|>\n",
        "<|system|>\nBe kind.</s>\n<|user|>\n Hello, you </s>\n<|assistant|>\n"),
}


def model_of(tiny, template, **meta):
    return tinymia.load(tiny(meta={"tokenizer.chat_template": template, **meta}), threads=1)


def formatted(model, messages, system=None):
    return files_chat.format_chat(model.template, model.tokenizer, messages, system)


@pytest.mark.parametrize("name", TEMPLATES)
def test_five_templates_give_what_their_models_were_trained_on(tiny, name):
    model, (plain, with_system) = model_of(tiny, TEMPLATES[name]), EXPECTED[name]
    assert formatted(model, MESSAGES).text == plain
    if with_system is None:
        with pytest.raises(tinymia.Error, match="the chat template refuses these messages: "):
            formatted(model, SYSTEM)
        return
    assert formatted(model, SYSTEM).text == formatted(model, " Hello, you ", "Be kind.").text == with_system


@pytest.mark.parametrize("name", TEMPLATES)
def test_llama_cpp_formats_them_the_same(tiny, name):
    formats = pytest.importorskip("llama_cpp.llama_chat_format",
                                  reason="needs llama.cpp: pip install 'tinymia[verify]'")
    theirs = formats.Jinja2ChatFormatter(TEMPLATES[name], eos_token="</s>", bos_token="<s>")
    for messages, want in zip((MESSAGES, SYSTEM), EXPECTED[name]):
        if want is not None:
            assert theirs(messages=messages).prompt == want


@pytest.mark.parametrize("name", TEMPLATES)
def test_bos_is_there_once_and_no_eos_ends_the_prompt(tiny, name):
    for add_eos in (False, True):
        model = model_of(tiny, TEMPLATES[name], **{"tokenizer.ggml.add_eos_token": add_eos})
        ids = model.chat(MESSAGES[:1])
        want = EXPECTED[name][0].split("</s>" if name in ("llama-2", "mistral") else "<nothing>")[0]
        assert ids[0] == 1 and ids[1] != 1 and ids[-1] != 2, want
        assert ids.count(1) == 1


def test_ids_are_those_of_the_text_with_its_special_tokens(tiny):
    model = model_of(tiny, TEMPLATES["zephyr"])
    assert model.chat(MESSAGES) == model.tokenize(EXPECTED["zephyr"][0])
    assert model.chat(MESSAGES).count(2) == 3


def test_special_tokens_that_people_write_are_plain_text(tiny):
    model = model_of(tiny, TEMPLATES["zephyr"])
    said = "</s> is the end </s></s>, <s>, <unk></s"
    chat = formatted(model, [{"role": "user", "content": said}, {"role": "assistant", "content": "no </s>"}], "<s>ys")
    assert chat.text == f"<|system|>\n<s>ys</s>\n<|user|>\n{said}</s>\n<|assistant|>\nno </s></s>\n<|assistant|>\n"
    assert chat.ids.count(2) == 3 and chat.ids.count(1) == 1 and 0 not in chat.ids
    parts = chat.text.split("</s>\n")
    ids = [1]
    for part in parts[:-1]:
        ids += [*model.tokenize(part, bos=False, special=False), 2] if part is parts[0] else \
            [*model.tokenizer._encode("\n" + part), 2]
    assert chat.ids == [*ids, *model.tokenizer._encode("\n" + parts[-1])]


def test_the_templates_own_system_message_is_found(tiny):
    smol = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ "
            "'<|im_start|>system\nYou are a helpful AI assistant named SmolLM</s>\n' }}{% endif %}"
            "{{'<|im_start|>' + message['role'] + '\n' + "
            "message['content'] + '</s>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ "
            "'<|im_start|>assistant\n' "
            "}}{% endif %}")
    model = model_of(tiny, smol)
    assert formatted(model, "hi </s>").default_system == "You are a helpful AI assistant named SmolLM"
    assert formatted(model, "hi", "Be kind.").default_system == ""
    assert all(formatted(model_of(tiny, t), "hi").default_system == "" for t in TEMPLATES.values())


@pytest.mark.parametrize(("template", "says"), [
    ("{{ raise_exception('no\nway') }}", "refuses these messages: no way"),
    ("{% for %}", "is not jinja2"),
    ("{{ messages.nothing.at.all }}", "fails"),
    ("{{ 1 / 0 }}", "fails: ZeroDivisionError"),
    ("{% include '/etc/passwd' %}", "fails"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "may not have"),
    ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "may not have"),
    ("{{ messages.append(1) }}", "may not have"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails"),
    ("{{ range(10**9) | list }}", "fails"),
    ("{{ 'x' * 10**10 }}", "memory"),
])
def test_a_template_that_misbehaves_is_one_clear_line(tiny, template, says):
    model = model_of(tiny, template)
    with pytest.raises(tinymia.Error) as e:
        model.chat("hi")
    assert says in str(e.value) and "\n" not in str(e.value) and "the chat template" in str(e.value)
    assert len(str(e.value)) < 400


def test_a_template_that_loops_is_stopped(tiny, monkeypatch):
    monkeypatch.setattr(files_chat, "SECONDS", 1)
    model = model_of(tiny, "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    with pytest.raises(tinymia.Error, match="takes more than 1 seconds"):
        model.chat("hi")


def test_a_template_sees_no_file_of_the_current_folder(tiny, tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('a file beside the user was run')")
    monkeypatch.chdir(tmp_path)
    assert formatted(model_of(tiny, TEMPLATES["chatml"]), MESSAGES).text == EXPECTED["chatml"][0]


@pytest.mark.parametrize(("messages", "system", "says"), [
    ([], None, "one message or more"), ([{"role": "user"}], None, "message 1 must be"),
    (["hi"], None, "message 1 must be"),
    ([{"role": "user", "content": 3}], None, "message 1 must be"), (SYSTEM, "x", "two system messages"),
])
def test_what_is_not_a_message_is_refused(tiny, messages, system, says):
    with pytest.raises(tinymia.Error, match=says):
        model_of(tiny, TEMPLATES["chatml"]).chat(messages, system)


def test_a_file_without_a_template_says_so(copycat):
    with pytest.raises(tinymia.Error, match="the file has no chat template"):
        copycat.chat("hi")
    status, _, err = command("--chat", "-p", "France ->")
    assert status == 2 and "no chat template" in err.splitlines()[-1]


# ---------------------------------------------------------------------------------------- command line


def test_chat_on_the_command_line_of_the_program_and_the_lab(tiny, tmp_path):
    path = tiny(meta={"tokenizer.chat_template": TEMPLATES["zephyr"]})
    model = tinymia.load(path, threads=1)
    want, other = model.chat("one\ntwo"), model.chat("six\ntwo")
    status, out, err = command("-m", path, "--chat", "-e", "-p", "one\\ntwo", "-n", "2", "--json")
    assert status == 0, err
    assert [t["id"] for t in json.loads(out)["tokens"]] == want
    assert json.loads(out)["output_tokens"] == model.generate(want, 2).tokens
    assert f"{len(want) - 1} " in err       # the table of tokens
    for args in (["lens"], ["attend", "--layers", "0"], ["attribute"], ["trace"], ["ablate", "--layers", "0"]):
        status, out, err = command(*args, "-m", path, "--chat", "-e", "-p", "one\\ntwo", "--json")
        assert status == 0 and json.loads(out)["about"]["prompts"]["prompt"]["tokens"] == want, err
    status, out, err = command("sweep", "-m", path, "--chat", "--clean", "one", "--corrupt", "six", "--metric", "kl",
                               "--answer", "#5", "--against", "#6", "--json")
    assert status == 0, err
    assert json.loads(out)["about"]["prompts"]["clean"]["tokens"] == model.chat("one")
    (tmp_path / "p.json").write_text(json.dumps(["one\ntwo", "six\ntwo"]))
    (tmp_path / "n.json").write_text(json.dumps(["one"]))
    status, out, err = command("steer", "-m", path, "--chat", "-p", "one", "--positive", tmp_path / "p.json",
                               "--negative", tmp_path / "n.json", "-n", "1", "--json")
    assert status == 0, err
    prompts = json.loads(out)["about"]["prompts"]
    assert [p["tokens"] for p in prompts["positive"]] == [want, other]


@pytest.mark.parametrize(("args", "says"), [
    (["--system", "x", "-p", "a"], "--system goes with --chat"),
    (["--chat", "--no-bos", "-p", "a"], "--chat decides on BOS"),
    (["-e", "-f", "nothing"], "-e goes with -p"), (["--keep-line-end", "-p", "a"], "--keep-line-end goes with -f"),
    (["-e", "-p", "a\\q"], "is not an escape"), (["-e", "-p", "a\\"], "is not an escape"),
])
def test_flags_that_do_not_go_together(args, says):
    for first in ([], ["lens"]):
        status, _, err = command(*first, *args)
        assert status == 2 and says in err and err.count("\n") <= 2, err


def test_e_reads_line_ends_and_f_keeps_the_last_one(tmp_path):
    (tmp_path / "p.txt").write_text("a\tb\\\nc\n")
    cases = [(["-p", "a\tb\\\nc"], "a\tb\\\nc"), (["-e", "-p", "a\\tb\\\\\\nc"], "a\tb\\\nc"),
             (["-e", "-p", "\\\\n"], "\\n"),
             (["-p", "a\\n"], "a\\n"), (["-f", tmp_path / "p.txt"], "a\tb\\\nc"),
             (["-f", tmp_path / "p.txt", "--keep-line-end"], "a\tb\\\nc\n")]
    for args, want in cases:
        status, out, err = command(*args, "-n", "1", "--json")
        assert status == 0 and json.loads(out)["prompt"] == want, err


@pytest.mark.parametrize("args", [
    ["sweep", "--layers", "0", "--clean", "Egypt\\n ->", "--corrupt", "Norway\\n ->"],
    ["path", "--receiver", "logits", "--clean", "Egypt\\n ->", "--corrupt", "Norway\\n ->"],
    ["story", "--clean", "Egypt\\n ->", "--corrupt", "Norway\\n ->"],
    ["ablate", "--layers", "0", "-p", "Egypt\\n ->", "--mode", "resample", "--other", "Norway\\n ->"],
])
def test_every_prompt_on_the_command_line_reads_e_or_tells_of_the_backslash(args):
    def shown(out):
        prompts = json.loads(out)["about"]["prompts"].values()
        return [prompt["text"] for prompt in prompts if isinstance(prompt, dict)]

    status, out, err = command(*args, "--json")
    assert status == 0 and err.count("has a backslash and a letter") == 2, err
    assert "Egypt\\n ->" in shown(out)
    status, out, err = command(*args, "-e", "--json")
    assert status == 0 and "backslash" not in err and "Egypt\n ->" in shown(out), err


# ---------------------------------------------------------------------------------------- a real model


def test_a_real_chat_ends_at_the_end_of_the_turn_and_a_bare_question_gets_a_note():
    asked = ["-m", real_model(), "--chat", "-p", "What is 2 + 2? Answer with one number.", "-n", "60", "--json"]
    status, out, err = command(*asked)
    assert status == 0 and json.loads(out)["stop"] == "eos" and "system message of its own: 'You are a helpful" in err
    status, out, err = command("-m", real_model(), "-p", "What is the capital of France?", "-n", "5")
    assert status == 0 and 'output: ""' in out and "--chat puts the prompt into the form" in err


def test_a_real_chats_tokens_equal_llama_cpps():
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install 'tinymia[verify]'")
    model = tinymia.load(real_model(), threads=1)
    theirs = llama_cpp.Llama(str(model.path), vocab_only=True, verbose=False)
    formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(model.template, eos_token="<|im_end|>",
                                                                bos_token="<|im_start|>")
    for messages in (MESSAGES, SYSTEM):
        text = formatter(messages=messages).prompt
        assert model.chat(messages) == theirs.tokenize(text.encode(), add_bos=False, special=True)
        np.testing.assert_array_equal(formatted(model, messages).text, text)
    user = model.chat("a <|im_end|> b")
    assert user.count(2) == 2       # of the system message and of the user's, none in the text
