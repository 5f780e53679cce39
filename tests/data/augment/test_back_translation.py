"""Back-translation: chrF by hand, each gate, the cache, and every engine: Apertium for real, HTTP against a server,
MarianMT and CTranslate2 with a tiny random model (our calls and batches are tested, not its translations)."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from pellucid.config import UserError
from pellucid.data.augment.back_translation import BackTranslation, Gates, is_prose, rewrap
from pellucid.data.augment.chrf import chrf
from pellucid.data.augment.translation_cache import CachedTranslator
from pellucid.data.augment.translators import Apertium, HttpTranslator


def stream(seed=0):
    return np.random.Generator(np.random.Philox(seed))


@pytest.mark.parametrize("hypothesis, reference, score", [
    ("the cat", "the cat", 1.0), ("", "a", 0.0), ("hello world", "xyz", 0.0),
    ("abc", "abd", (2 / 3 + 1 / 2 + 0) / 3),  # by hand: precision = recall for n = 1, 2, 3
    ("aaaa", "aa", 5 * (5 / 12) * 1 / (4 * 5 / 12 + 1)),  # by hand: precision (2/4 + 1/3) / 2, recall 1
    ("The quick brown fox", "A fast brown fox", 0.4831554138123887),  # sacrebleu 2.6.0, CHRF().sentence_score / 100
    ("Ĉu vi parolas Esperanton? Jes!", "Ĉu vi scias Esperanton? Ne.", 0.5823321317501665),
    ("The physician bought an automobile.", "The doctor bought a car.", 0.3220291809345488),
])  # fmt: skip
def test_chrf_equals_hand_worked_values_and_sacrebleu(hypothesis, reference, score):
    assert chrf(hypothesis, reference) == pytest.approx(score, abs=1e-12)  # the same sums in double precision


@pytest.mark.parametrize("trip, why", [
    ("In 1999 the old city of Rome did not have a_name for it here.", None),
    ("In 1999 the old town of Rome did not have a_name for it.", "score too high"),
    ("", "empty"), ("1999", "length"), ("In 1998 the old city of Rome did not have a_name for it.", "numbers"),
    ("In 1999 the old city of room did not have a_name for it.", "names"),
    ("In 1999 the old city of Rome did not have a name for it.", "markup"),
    ("In 1999 the old city of Rome did have a_name for it too.", "negation"),
    ("1999 Rome a_name not zzz qqq vvv www xxx yyy jjj kkk uuu ppp", "score too low"),
])  # fmt: skip
def test_each_gate_refuses_what_it_is_for(trip, why):
    original = "In 1999 the old town of Rome did not have a_name for it."
    assert Gates(chrf_low=0.4, chrf_high=0.95).refuse(original, trip) == why


class Upper:
    """Translates by a rule and remembers what it was asked."""

    fingerprint, sampling = "upper-1", False

    def __init__(self):
        self.calls = []

    def translate(self, texts, source, target, *, seed=0):
        self.calls.append((list(texts), source, target, seed))
        old, new = ("big", "large") if source == "en" else ("large", "grand")
        return [text.replace(old, new) + f"{seed or ''}" for text in texts]


def test_cache_answers_what_was_asked_before_also_from_disk(tmp_path):
    engine = Upper()
    cached = CachedTranslator(engine, tmp_path / "deep" / "t.sqlite")
    assert cached.translate(["a big one", "b", "b"], "en", "xx") == ["a large one", "b", "b"]
    assert engine.calls == [(["a big one", "b"], "en", "xx", 0)]  # the repeated text once
    cached.translate(["b", "c"], "en", "xx")
    assert engine.calls[1][0] == ["c"] and (cached.hits, cached.misses) == (1, 3)
    cached.close()
    again = CachedTranslator(Upper(), tmp_path / "deep" / "t.sqlite")
    assert again.translate(["c", "a big one"], "en", "xx") == ["c", "a large one"] and again.misses == 0
    for languages, seed in ((("xx", "en"), 0), (("en", "xx"), 1)):  # another question, another answer
        again.translate(["c"], *languages, seed=seed)
    assert again.misses == 2
    other = Upper()
    other.fingerprint = "upper-2"
    assert CachedTranslator(other, tmp_path / "deep" / "t.sqlite").translate(["c"], "en", "xx") and other.calls


def test_a_damaged_cache_is_one_sentence(tmp_path):
    (tmp_path / "t.sqlite").write_bytes(b"not a database at all, really not" * 100)
    with pytest.raises(UserError, match="cannot keep translations there"):
        CachedTranslator(Upper(), tmp_path / "t.sqlite")


def test_only_prose_goes_and_layout_stays():
    text = "# The big title\n\nThe big cat sat\n  on the old mat today.  It was not big at all, I say!\n\n    code = big\n"
    engine = Upper()
    augment = BackTranslation(engine, "en", "xx", 1.0, Gates(chrf_high=0.999))
    outcome = augment(text, stream())
    assert [call[0] for call in engine.calls[:1]] == [
        ["The big cat sat on the old mat today.", "It was not big at all, I say!"]]
    assert outcome.changed == 2
    assert outcome.text == (
        "# The big title\n\nThe grand cat\n  sat on the old mat today.  It was not grand at all, I say!\n\n    code = big\n")
    assert BackTranslation(engine, "en", "xx", 0.0, Gates())(text, stream()).text == text


def test_sampling_engines_get_a_seed_per_document():
    engine = Upper()
    engine.sampling = True
    texts = ["The big cat sat on the mat.", "The big dog sat on the mat."]
    BackTranslation(engine, "en", "xx", 1.0, Gates()).batch(texts, [stream(1), stream(2)])
    there = [call for call in engine.calls if call[1] == "en"]
    assert [len(call[0]) for call in there] == [1, 1] and there[0][3] != there[1][3]


def test_prose_and_line_ends():
    assert is_prose('He said: "So it is, then."')
    assert not is_prose("Too short.") and not is_prose("x = y + 1; z = 2 * 3 / 4.")
    assert rewrap("one two\n  three four", "uno dos tres quatro") == "uno dos\n  tres quatro"
    assert rewrap("one two", "uno dos") == "uno dos" and rewrap("a\nb", "long") == "long"


# ------------------------------------------------------------------------------------------- engines

SENTENCES = ["She quickly closed the door because the noise of the street was unbearable.",
             "The dog [sleeps] at 3/4 {x} ^y$.",
             "What is it", "in a stylish manner; He was smartly dressed", "‘Quoted’ — naïve 日本 😀 *t @u ~\\n <b>."]


def test_apertium_translates_each_text_whatever_stands_beside_it(need):
    need("/usr/share/apertium/modes/en-eo.mode", "apertium apertium-eo-en")
    engine = Apertium()
    there = engine.translate(SENTENCES, "en", "eo")
    assert engine.translate(SENTENCES[::-1], "en", "eo")[::-1] == there
    assert engine.translate(SENTENCES[1:2], "en", "eo") == there[1:2]
    assert "fermis la pordon" in there[0] and there[0].endswith(".")
    assert "[" in there[1] and "3/4 {x} ^y$." in there[1] and "日本 😀 *t @u" in there[4] and "<b>" in there[4]
    back = engine.translate(there[:1], "eo", "en")[0]
    assert "closed the door" in back and 0.3 < chrf(back, SENTENCES[0]) <= 1
    assert engine.translate([], "en", "eo") == []


def test_spanish_round_trip_passes_the_gates(tmp_path, need):
    need("/usr/share/apertium/modes/eng-spa.mode", "apertium-eng-spa")
    cached = CachedTranslator(Apertium(), tmp_path / "t.sqlite")
    augment = BackTranslation(cached, "eng", "spa", 1.0, Gates())
    text = "The committee will announce\nits final decision about the budget on Monday morning."
    outcome = augment(text, stream())
    assert outcome.changed == 1 and outcome.text != text and "Monday" in outcome.text and outcome.text.count("\n") == 1
    assert cached.misses == 2 and augment(text, stream(9)).text == outcome.text and cached.misses == 2


def test_a_missing_engine_or_pair_is_one_sentence(tmp_path, monkeypatch, need):
    need("/usr/share/apertium/modes/en-eo.mode", "apertium apertium-eo-en")
    with pytest.raises(UserError, match=r"no pair en-tlh \(installed: .*en-eo"):
        Apertium().translate(["x"], "en", "tlh")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="apt-get install apertium"):
        Apertium().translate(["x"], "en", "eo")


@pytest.fixture
def server():
    class Handler(BaseHTTPRequestHandler):
        asked, answer = [], None

        def do_POST(self):
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            Handler.asked.append((self.path, question))
            body = Handler.answer or {"translatedText": [t.upper() for t in question["q"]]}
            self.send_response(200 if body != "error" else 500)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, Handler, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_http_engine_speaks_the_protocol_in_batches(server):
    _, handler, url = server
    engine = HttpTranslator(url + "/", api_key="k", batch_size=2)
    assert engine.translate(["a", "b", "ĉ"], "en", "eo") == ["A", "B", "Ĉ"]
    assert handler.asked == [
        ("/translate", {"q": ["a", "b"], "source": "en", "target": "eo", "format": "text", "api_key": "k"}),
        ("/translate", {"q": ["ĉ"], "source": "en", "target": "eo", "format": "text", "api_key": "k"})]


@pytest.mark.parametrize("answer, sentence", [
    ("error", "answered 500"), ({"translatedText": ["one"]}, "not one translation per text"), ({"no": 1}, "start one")])
def test_http_faults_are_one_sentence(server, answer, sentence):
    _, handler, url = server
    handler.answer = answer
    with pytest.raises(UserError, match=sentence):
        HttpTranslator(url).translate(["a", "b"], "en", "eo")


def test_no_server_and_no_url_are_one_sentence():
    with pytest.raises(UserError, match="no translation server answers there"):
        HttpTranslator("http://127.0.0.1:9").translate(["a"], "en", "eo")
    with pytest.raises(UserError, match="must start with http"):
        HttpTranslator("file:///etc/passwd")
