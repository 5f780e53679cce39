"""Settings: presets, overrides, budgets, paths, sentences for mistakes, and the round trip through TOML."""

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.config import (
    BUDGETS,
    Config,
    ModelConfig,
    UserError,
    grok_intermediate_size,
    load_config,
    make_config,
    preset_names,
)


def refusal(tables=None, overrides=()):
    with pytest.raises(UserError) as caught:
        make_config(tables) if tables is not None else load_config(None, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("tables", "key", "nearest"),
    [
        ({"modle": {}}, "modle", "model"),
        ({"model": {"num_expert": 4}}, "model.num_expert", "num_experts"),
        ({"training": {"batchsize": 4}}, "training.batchsize", "batch_size"),
        ({"optimizer": {"lr": 1.0, "learningrate": 1.0}}, "optimizer.lr", None),
        ({"data": {"tokenizer": {"vocabsize": 300}}}, "data.tokenizer.vocabsize", "vocab_size"),
        ({"data": {"normalize": {"unicod": "NFC"}}}, "data.normalize.unicod", "unicode"),
        ({"data": {"sources": [{"path": "x", "textfield": "t"}]}}, "data.sources[0].textfield", "text_field"),
        ({"data": {"validation": ["a", {"path": "x", "wieght": 2}]}}, "data.validation[1].wieght", "weight"),
        ({"checkpoint": {"every": 5}}, "checkpoint.every", "every_steps"),
    ],
)
def test_unknown_key_is_an_error_that_names_the_nearest_known_one(tables, key, nearest):
    message = refusal(tables)
    assert f"unknown key '{key}'" in message
    assert f"did you mean '{nearest}'?" in message if nearest else "known: " in message or "did you mean" in message


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ({"model": {"hidden_size": 100, "num_attention_heads": 3}}, "hidden_size 100 is not a multiple of"),
        ({"model": {"head_dim": 5}}, "head_dim 5 must be even"),
        ({"model": {"num_attention_heads": 4, "num_key_value_heads": 3}}, "num_key_value_heads 3 must divide"),
        ({"model": {"num_experts": 2, "num_experts_per_tok": 3}}, "num_experts_per_tok 3 exceeds num_experts 2"),
        ({"model": {"vocab_size": 5, "eos_token_id": 9}}, "vocab_size 5 does not hold"),
        ({"model": {"vocab_size": 2}}, "model.vocab_size: "),
        ({"model": {"num_hidden_layers": 0}}, "model.num_hidden_layers: "),
        ({"model": {"hidden_size": "wide"}}, "model.hidden_size: "),
        ({"model": {"tie_word_embeddings": False}}, "model.tie_word_embeddings: "),
        ({"model": {"preset": "smal"}}, "there is no preset 'smal'; did you mean 'small'?"),
        ({"model": {"max_position_embeddings": 64}, "data": {"sequence_length": 128}}, "data.sequence_length 128 exceeds"),
        ({"data": {"tokenizer": {"vocab_size": 100}}}, "data.tokenizer.vocab_size: "),
        ({"data": {"tokenizer": {"kind": "file"}}}, "path belongs to kind = 'file'"),
        ({"data": {"sources": []}}, "data.sources: "),
        ({"data": {"sources": 3}}, "data.sources: "),
        ({"data": {"sources": [3]}}, "data.sources[0]: "),
        ({"data": {"validation_fraction": 1.0}}, "data.validation_fraction: "),
        ({"training": {"max_steps": 5, "max_epochs": 1}}, "give one budget, not max_steps and max_epochs"),
        ({"training": {"batch_size": 6, "micro_batch_size": 4}}, "batch_size 6 is not a multiple of micro_batch_size 4"),
        ({"training": {"precision": "fp64"}}, "training.precision: "),
        ({"optimizer": {"name": "adamax"}}, "optimizer.name: "),
        ({"optimizer": {"learning_rate": 0}}, "optimizer.learning_rate: "),
        ({"schedule": {"name": "cosin"}}, "schedule.name: "),
        ({"model": 3}, "model: "),
        ({"model": {"preset": 5}}, "there is no preset '5'; known: tiny, "),
        ({"training": {"seed": 2**63}}, "training.seed: "),
        ({"training": {"max_steps": True}}, "training: max_steps must be a number, not true"),
        ({"optimizer": {"weight_decay": False}}, "optimizer: weight_decay must be a number, not false"),
        ({"training": {"task": "regression"}, "data": {"label_field": []}}, "data: label_field: give at least one field"),
        ({"training": {"task": "regression"}, "data": {"label_field": ["a", "b", "a"]}}, "data: label_field: 'a' is there twice"),
        ({"data": {"label_field": [3]}}, "data.label_field[0]: "),
        ({"training": {"class_weights": {"spam": -5.0}}}, "training.class_weights.spam: Input should be greater than or equal to 0"),
        ({"training": {"class_weights": {"spam": "x"}}}, "training.class_weights.spam: Input should be a valid number"),
        ({"training": {"class_weights": "balance"}}, "training.class_weights: Input should be 'balanced'"),
        ({"training": "long"}, "training: "),
    ],
)
def test_impossible_values_are_one_sentence_that_names_the_key(tables, expected):
    assert expected in refusal(tables)


def test_overrides_take_toml_values_and_bare_words():
    config = load_config(None, [
        "model.preset=tiny", "training.max_steps=7", "optimizer.name=lion", "optimizer.learning_rate=1e-3",
        'data.sources=["a.txt", {path = "b.jsonl", text_field = "body", weight = 2.0}]', "data.tokenizer.kind=bytes",
        "observe.enabled=false",
    ])  # fmt: skip
    assert (config.training.max_steps, config.optimizer.name, config.optimizer.learning_rate) == (7, "lion", 1e-3)
    assert [s.path for s in config.data.sources] == ["a.txt", "b.jsonl"] and config.data.sources[1].text_field == "body"
    assert config.data.tokenizer.kind == "bytes" and config.observe.enabled is False


@pytest.mark.parametrize(
    ("override", "expected"),
    [("steps", "neither a configuration file nor key=value"), ("training.max_steps.x=1", "training.max_steps"),
     ("nonsense=1", "unknown key 'nonsense'"), ("=1", "unknown key"), ("training.=1", "unknown key"),
     ("training=1", "training: ")],
)  # fmt: skip
def test_bad_overrides_are_refused(override, expected):
    assert expected in refusal(None, ["training.max_steps=3", override])


def test_override_of_a_budget_replaces_that_of_the_file(tmp_path):
    (tmp_path / "a.toml").write_text("[training]\nmax_epochs = 2\n")
    config = load_config(tmp_path / "a.toml", ["training.max_tokens=1000"])
    assert (config.training.max_tokens, config.training.max_epochs, config.training.max_steps) == (1000, None, None)


def test_two_budgets_on_one_command_line_are_refused(tmp_path):
    assert "give one budget" in refusal(None, ["training.max_steps=3", "training.max_epochs=2"])


def test_one_budget_always():
    assert make_config({"model": {"hidden_size": 16}}).training.max_steps == 1000
    for name in BUDGETS:
        for model in ({"preset": "tiny"}, {"hidden_size": 16}):
            training = make_config({"model": model, "training": {name: 3}}).training
            assert {b: getattr(training, b) for b in BUDGETS} == {**dict.fromkeys(BUDGETS), name: 3}


def test_micro_batch_defaults_to_the_batch():
    assert make_config({"training": {"batch_size": 6}}).training.micro_batch_size == 6
    assert load_config(None, ["training.batch_size=6", "training.micro_batch_size=2"]).training.micro_batch_size == 2


def test_embedded_default_is_the_small_preset_on_the_standard_library():
    for config in (Config(), load_config(), make_config({})):
        assert config.model.preset == "small" and config.data.sources[0].path == "builtin:python"
        assert config == Config()


def test_overrides_without_a_file_change_the_embedded_default_and_nothing_else():
    config = load_config(None, ["model.num_hidden_layers=2", "training.max_steps=5"])
    default = Config()
    assert config.model.num_hidden_layers == 2 and config.training.max_steps == 5
    assert config.model.hidden_size == default.model.hidden_size
    assert config.data == default.data and config.optimizer == default.optimizer and config.schedule == default.schedule
    assert load_config(None, ["model.preset=tiny"]).model.hidden_size == 64


def test_overrides_of_a_file_without_a_model_change_its_default_model(tmp_path):
    (tmp_path / "a.toml").write_text("[training]\nmax_steps = 3\n")
    plain, changed = load_config(tmp_path / "a.toml"), load_config(tmp_path / "a.toml", ["model.num_experts=4"])
    assert changed.model.num_experts == 4
    assert changed == plain.model_copy(update={"model": plain.model.model_copy(update={"num_experts": 4})})


@pytest.mark.parametrize(
    "given",
    [["model.preset=tiny"], ["model.preset=tiny", "model.num_experts=4", "optimizer.learning_rate=0.5", "data.tokenizer.kind=bytes"],
     ["model.hidden_size=64", "model.num_attention_heads=4", "optimizer.name=lion",
      "optimizer.weight_decay=0.3", "training.max_tokens=5000"]],
)  # fmt: skip
@pytest.mark.parametrize(
    "changed",
    [["model.hidden_size=32"], ["model.num_attention_heads=2"], ["optimizer.name=adam"], ["training.batch_size=6"],
     ["schedule.name=constant", "data.sequence_length=16"]],
)  # fmt: skip
def test_overrides_of_a_runs_own_configuration_are_those_of_what_it_was_made_from(given, changed, tmp_path):
    """It spells out what follows from what was given: that follows anew."""
    own = tmp_path / "config.toml"
    own.write_text(load_config(None, given).to_toml())
    (tmp_path / "manifest.json").write_text("{}")
    assert load_config(own) == load_config(None, given)
    assert load_config(own, changed) == load_config(None, [*given, *changed])


def test_a_preset_takes_the_place_of_a_runs_whole_shape(tmp_path):
    own = tmp_path / "config.toml"
    own.write_text(load_config(None, ["model.preset=tiny", "model.num_experts=4", "training.seed=3"]).to_toml())
    (tmp_path / "manifest.json").write_text("{}")
    overrides = ["model.num_key_value_heads=2", "model.preset=base"]
    assert load_config(own, overrides) == load_config(None, [*overrides, "training.seed=3"])


def test_other_weights_take_the_place_of_a_runs_whole_shape_and_of_the_tokenizer_that_came_with_the_old_ones(tmp_path):
    own = tmp_path / "config.toml"
    (tmp_path / "manifest.json").write_text("{}")
    tokenizer = ["data.tokenizer.kind=file", "data.tokenizer.path=/tokenizer"]
    own.write_text(load_config(None, ["model.init_from=/old", "model.hidden_size=64", "training.seed=3", *tokenizer]).to_toml())
    assert load_config(own, ["model.init_from=/new"]) == load_config(None, ["model.init_from=/new", "training.seed=3"])
    old = load_config(None, ["model.preset=tiny", "training.seed=3", *tokenizer])
    own.write_text(old.to_toml())
    changed = load_config(own, ["model.init_from=/new"])
    assert changed.model == make_config({"model": {"init_from": "/new"}}).model
    assert (changed.optimizer, changed.training, changed.data) == (old.optimizer, old.training, old.data)
    assert changed.data.tokenizer.path == "/tokenizer", "whoever gave it knows what it is for"


def test_a_shape_is_a_preset_or_that_of_other_weights(tmp_path):
    assert "model.init_from brings its own shape: leave model.preset out" in refusal({"model": {"preset": "tiny", "init_from": "x"}})
    assert load_config(None, ["model.init_from=x"]) == make_config({"model": {"init_from": "x"}})
    assert "leave model.preset out" in refusal(None, ["model.init_from=x", "model.preset=tiny"])


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_whole_and_follow_the_shape_rules(name):
    config = make_config({"model": {"preset": name}})
    model = config.model
    assert model.intermediate_size == grok_intermediate_size(model.hidden_size)
    assert model.embedding_multiplier_scale == pytest.approx(model.hidden_size**0.5)
    assert model.attn_output_multiplier == pytest.approx(model.head_dim**-0.5)
    assert model.output_multiplier_scale == pytest.approx(3**-0.5)
    assert (model.num_experts, model.num_experts_per_tok, model.max_attn_value) == (8, 2, 30.0)


def test_presets_come_smallest_first():
    sizes = [make_config({"model": {"preset": name}}).model.hidden_size for name in preset_names()]
    assert sizes == sorted(sizes) and preset_names()[-1] == "grok-1"


def test_intermediate_size_is_the_official_rule():
    assert grok_intermediate_size(6144) == 32768
    assert all(grok_intermediate_size(D) % 8 == 0 for D in range(2, 300))


def test_preset_values_give_way_to_given_ones():
    config = make_config({"model": {"preset": "tiny", "hidden_size": 32}, "data": {"tokenizer": {"vocab_size": 999}},
                          "optimizer": {"learning_rate": 1.0}})  # fmt: skip
    assert config.model.hidden_size == 32 and config.model.num_hidden_layers == 2 and config.model.head_dim == 8
    assert config.data.tokenizer.vocab_size == 999 and config.data.sequence_length == 128
    assert (config.optimizer.learning_rate, config.optimizer.name) == (1.0, "muon")


def test_a_sequence_length_that_nobody_gave_follows_the_model():
    config = make_config({"model": {"max_position_embeddings": 64}})
    assert config.data.sequence_length == 64
    assert make_config({"model": {"preset": "tiny", "max_position_embeddings": 64}}).data.sequence_length == 64
    assert make_config({"model": {"preset": "tiny", "max_position_embeddings": 200}}).data.sequence_length == 128
    with pytest.raises(UserError, match=r"data\.sequence_length 2 exceeds model\.max_position_embeddings 1"):
        make_config({"model": {"max_position_embeddings": 1}})


def test_relative_paths_mean_beside_the_file(tmp_path, monkeypatch):
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "a.toml").write_text(
        '[data]\nsources = ["x.txt", "/abs/y.txt", "builtin:python", {path = "odd:name.txt"}, "s3://b/x"]\n'
        'validation = ["../v/*.txt"]\n'
        '[data.tokenizer]\nkind = "file"\npath = "tok.json"\n'
    )
    monkeypatch.chdir(tmp_path)
    data = load_config("settings/a.toml").data
    beside = tmp_path / "settings"
    assert [s.path for s in data.sources] == [
        str(beside / "x.txt"), "/abs/y.txt", "builtin:python", str(beside / "odd:name.txt"), "s3://b/x"]  # fmt: skip
    assert data.validation[0].path == str(tmp_path / "v/*.txt")
    assert data.tokenizer.path == str(beside / "tok.json")


@pytest.mark.parametrize(
    ("text", "expected"),
    [(b"[model\n", "not valid TOML"), (b"\xff\xfe", "not valid TOML"), (b"[modle]\n", "unknown key 'modle'"),
     (b"data = 3\n", "data: "), (b"[data]\ntokenizer = 3\n", "data.tokenizer: "), (b"model = 3\n", "model: "),
     (b"[optimizer]\nlearning_rate = inf\n", "optimizer.learning_rate: "), (b"[optimizer]\neps = nan\n", "optimizer.eps: ")],
)
def test_bad_files_are_named(tmp_path, text, expected):
    (tmp_path / "a.toml").write_bytes(text)
    with pytest.raises(UserError, match=expected) as caught:
        load_config(tmp_path / "a.toml")
    assert "a.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_and_folder_are_named(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(UserError, match="cannot read the configuration"):
            load_config(path)


def configurations():
    """Valid tables of many kinds."""
    return st.fixed_dictionaries({
        "model": st.one_of(
            st.sampled_from(preset_names()).map(lambda name: {"preset": name}),
            st.fixed_dictionaries({"hidden_size": st.sampled_from([8, 64, 96]), "vocab_size": st.integers(5, 10**6),
                                   "rope_theta": st.floats(1e-3, 1e9), "num_experts": st.integers(2, 64)})),
        "data": st.fixed_dictionaries({
            "sources": st.lists(st.fixed_dictionaries({
                "path": st.text(min_size=1).filter(lambda t: "\0" not in t), "weight": st.floats(1e-3, 1e3)}), min_size=1),
            "sequence_length": st.integers(2, 8192)}),
        "training": st.one_of(*(st.fixed_dictionaries({name: st.integers(1, 10**9)}) for name in BUDGETS)),
        "optimizer": st.fixed_dictionaries({"learning_rate": st.floats(1e-12, 10.0), "eps": st.floats(1e-30, 1.0)}),
    })  # fmt: skip


@given(tables=configurations())
@settings(max_examples=60, deadline=None)
def test_to_toml_and_back_is_the_same_configuration(tables):
    config = make_config(tables)
    assert make_config(tomllib.loads(config.to_toml())) == config


@given(st.dictionaries(st.sampled_from(["model", "data", "training", "optimizer", "x"]), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["sources", "tokenizer", "hidden_size", "max_steps", "path", "kind", "y"]), inner, max_size=3),
    max_leaves=6)))  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_whatever_the_tables_hold_the_answer_is_a_configuration_or_one_sentence(tables):
    try:
        assert isinstance(make_config(tables), Config)
    except UserError as error:
        assert str(error) and "\n" not in str(error)


def test_model_config_derives_grok_1():
    grok = ModelConfig(preset="grok-1")
    assert (grok.hidden_size, grok.intermediate_size, grok.num_hidden_layers, grok.vocab_size) == (6144, 32768, 64, 131072)
    assert (grok.num_attention_heads, grok.num_key_value_heads, grok.head_dim) == (48, 8, 128)
