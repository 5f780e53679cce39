"""MarianMT through transformers and through CTranslate2, with a tiny random model made here: our batches, order, seeds."""

import json

import pytest

from pellucid.config import UserError
from pellucid.data.augment.neural_translators import (
    CTranslate2Translator,
    TransformersTranslator,
    in_batches,
    load_transformers,
)

TEXTS = ["the cat sat on the mat", "a dog", "owls sang under the moon and the dog sat", "the mat", "a cat sang"]


@pytest.fixture(scope="session")
def marian(tmp_path_factory):
    """A folder with a MarianMT model of two thousand or so random weights, and its SentencePiece tokenizer."""
    transformers = pytest.importorskip("transformers")
    import sentencepiece
    import torch

    folder = tmp_path_factory.mktemp("marian")
    (folder / "corpus.txt").write_text("\n".join(TEXTS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "source"), vocab_size=40, hard_vocab_limit=False,
        minloglevel=2, num_threads=1)
    (folder / "source.model").rename(folder / "source.spm")
    (folder / "target.spm").write_bytes((folder / "source.spm").read_bytes())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=(folder / "source.spm").read_bytes())
    names = ["</s>", "<unk>", *(p for n in range(len(pieces)) if not (pieces.is_control(n) or pieces.is_unknown(n))
                                for p in [pieces.id_to_piece(n)]), "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({name: n for n, name in enumerate(names)}))
    torch.manual_seed(0)
    config = transformers.MarianConfig(
        vocab_size=len(names), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=512,
        pad_token_id=len(names) - 1, eos_token_id=0, decoder_start_token_id=len(names) - 1, forced_eos_token_id=None,
        init_std=1.0)
    tokenizer = transformers.MarianTokenizer(
        source_spm=str(folder / "source.spm"), target_spm=str(folder / "target.spm"), vocab=str(folder / "vocab.json"))
    transformers.MarianMTModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_batches_hold_texts_of_like_length_and_results_keep_their_order():
    seen = []
    made = in_batches(TEXTS, 2, lambda batch: seen.append(batch) or [t.upper() for t in batch])
    assert made == [t.upper() for t in TEXTS]
    assert [len(b) for b in seen] == [2, 2, 1] and [len(t) for b in seen for t in b] == sorted(map(len, TEXTS))


def test_marian_translates_each_text_as_generate_does_alone(marian):
    import torch

    model, tokenizer = load_transformers(str(marian))
    engine = TransformersTranslator({"en-xx": str(marian)}, batch_size=2)
    made = engine.translate(TEXTS, "en", "xx")
    for text, result in zip(TEXTS, made, strict=True):
        inputs = tokenizer([text], return_tensors="pt")
        ids = model.eval().generate(**inputs, num_beams=1, do_sample=False, max_new_tokens=256)
        assert tokenizer.batch_decode(ids, skip_special_tokens=True) == [result]
    assert len(set(made)) > 1
    state = torch.get_rng_state()
    assert engine.translate(TEXTS[::-1], "en", "xx") == made[::-1]
    assert torch.equal(torch.get_rng_state(), state)  # ours is not the only program that draws


def test_sampling_depends_on_text_and_seed_alone(marian):
    engine = TransformersTranslator({"*": str(marian)}, sampling=True)
    made = engine.translate(TEXTS, "en", "xx", seed=1)
    assert engine.translate(TEXTS[2:3], "en", "xx", seed=1) == made[2:3]
    assert engine.translate(TEXTS, "en", "xx", seed=2) != made


def test_nllb_gets_its_language_codes():
    torch = pytest.importorskip("torch")
    calls = {}

    class Tokens(dict):
        def to(self, device):
            return self

    class Tokenizer:
        src_lang = None

        def __call__(self, texts, **options):
            calls["source"] = self.src_lang
            return Tokens(input_ids=torch.zeros(len(texts), 1))

        def convert_tokens_to_ids(self, name):
            return {"deu_Latn": 7}[name]

        def batch_decode(self, ids, skip_special_tokens):
            return [str(int(i)) for i in ids]

    class Model:
        def to(self, device):
            return self

        def eval(self):
            return self

        def generate(self, input_ids, forced_bos_token_id, **options):
            return torch.full((len(input_ids),), forced_bos_token_id)

    engine = TransformersTranslator({"*": "nllb"}, load=lambda name: (Model(), Tokenizer()))
    assert engine.translate(["a", "b"], "en", "de") == ["7", "7"] and calls == {"source": "eng_Latn"}


def test_ctranslate2_gives_what_transformers_gives(marian, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    folder = tmp_path / "converted"
    try:
        converter = ctranslate2.converters.TransformersConverter(str(marian), copy_files=["source.spm", "target.spm"])
        converter.convert(str(folder))
    except Exception as error:
        pytest.skip(f"this ctranslate2 cannot convert this transformers' model: {error}")
    engine = CTranslate2Translator({"en-xx": str(folder)}, batch_size=2)
    ours = engine.translate(TEXTS, "en", "xx")
    assert ours == TransformersTranslator({"en-xx": str(marian)}).translate(TEXTS, "en", "xx")


@pytest.mark.parametrize("make", [TransformersTranslator, CTranslate2Translator])
def test_no_model_for_a_direction_and_no_such_model_are_one_sentence(make, tmp_path):
    pytest.importorskip("transformers" if make is TransformersTranslator else "ctranslate2")
    with pytest.raises(UserError, match="no model for en-de"):
        make({"de-en": "x"}).translate(["a"], "en", "de")
    with pytest.raises(UserError, match=r"cannot load the translation model|not a CTranslate2 model"):
        make({"*": str(tmp_path)}).translate(["a"], "en", "de")


@pytest.mark.parametrize("library", ["transformers", "ctranslate2"])
def test_a_missing_library_is_one_sentence(library, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(UserError, match="pip install pellucid"):
        load_transformers("x") if library == "transformers" else CTranslate2Translator({})
