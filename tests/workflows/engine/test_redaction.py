"""Secrets are hidden wherever they stand, and ordinary text is left alone."""

import pytest

from workflows.engine.redaction import redacted, redacted_tree, secrets_of


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://stillhouse:hunter2@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
        ("https://token123@mlflow.example/api", "https://***@mlflow.example/api"),
        ("s3://bucket/x?token=abcdef123&part=2", "s3://bucket/x?token=***&part=2"),
        ("key AKIAIOSFODNN7EXAMPLE in use", "key *** in use"),
        ("login hf_abcdefghijklmnopqrstuv", "login ***"),
        ("--header 'Authorization: Bearer abc.def-123456'", "--header 'Authorization: Bearer ***'"),
        ("password=hunter22, user=me", "password=***, user=me"),
    ],
)
def test_masked_secret_of_known_shape_is_hidden(text: str, shown: str) -> None:
    assert redacted(text, ()) == shown


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/models/a@v1/config.json",
        "pad_token=<pad> eos_token=</s>",
        "sqlite:////data/mlflow.db",
        "mail someone@example.org",
        "final/tokens_per_second: 100",
    ],
)
def test_masked_ordinary_text_stays(text: str) -> None:
    assert redacted(text, ()) == text


def test_masked_value_of_speaking_variable_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_REGISTRY_PASSWORD", "correct-horse")
    assert redacted("curl -u me:correct-horse") == "curl -u me:***"


def test_secrets_of_settings_and_paths_are_none(tmp_path: object) -> None:
    environ = {
        "TOKENIZERS_PARALLELISM": "false",
        "SSH_KEY_FILE": str(tmp_path),
        "PATH": "/usr/bin:/bin",
        "HF_TOKEN": "longer-secret",
    }
    assert secrets_of(environ) == ("longer-secret",)


def test_masked_tree_nested_values_are_hidden_and_keys_stay() -> None:
    value = {"token-name": ["https://u:p@h/", {"n": 3, "flag": True}], "x": None}
    assert redacted_tree(value, ()) == {"token-name": ["https://***@h/", {"n": 3, "flag": True}], "x": None}
