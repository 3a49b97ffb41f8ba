"""Text is decoded by its bytes; a guess is reported, and what cannot be guessed is refused."""

from pathlib import Path

import pytest

from conclugen_jax.data.text import decoded
from conclugen_jax.errors import ConclugenError

PATH = Path("words.srt")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_that_show_in_the_bytes(encoding):
    assert decoded("été 你好 cafe\u0301".encode(encoding), PATH) == ("été 你好 café", "")


@pytest.mark.parametrize("text", ["été à Noël", "ÜBER größe", "“NÃO” – 5 €", "¿Qué?"])
def test_windows_1252_is_read_and_reported(text):
    remark = "not in UTF-8, so read as Windows-1252: save it in UTF-8 if letters are wrong"
    assert decoded(text.encode("cp1252"), PATH) == (text, remark)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("你好,我的朋友", "gbk"),
        ("你好,我的朋友", "big5"),
        ("こんにちは", "shift-jis"),
        ("こんにちは", "euc-jp"),
        ("안녕하세요", "cp949"),
        ("привет, друг", "cp1251"),
        ("привет, друг", "koi8-r"),
        ("καλημέρα", "cp1253"),
        ("สวัสดี", "cp874"),
    ],
)
def test_other_encodings_are_refused(text, encoding):
    message = r"^words\.srt: not UTF-8 \(byte \d+\), and its encoding is unknown; save it in UTF-8$"
    with pytest.raises(ConclugenError, match=message):
        decoded(f"id,text\na,{text}\n".encode(encoding), PATH)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("café ".encode() + b"\xff", r"not UTF-8 \(byte 7\), and its encoding is unknown"),
        ("a".encode("utf-16") + b"\0", r"not UTF-16, as its first bytes say \(byte 5\), and its encoding"),
        ("words".encode("utf-16-le"), "holds zero bytes, as UTF-16 without its mark does"),
        ("words".encode("utf-32"), "holds zero bytes"),
    ],
)
def test_damaged_text_is_refused(content, message):
    with pytest.raises(ConclugenError, match=rf"^words\.srt: {message}.*; save it in UTF-8$"):
        decoded(content, PATH)
