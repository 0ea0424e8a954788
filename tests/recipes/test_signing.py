"""Signatures of model folders; skipped where the extra is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.errors import DataError
from recipes.signing import require_signature, sign


def test_a_signed_folder_and_a_changed_one(tmp_path: Path) -> None:
    pytest.importorskip("model_signing", reason="pip install 'retort[signing]'")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    private.write_bytes(key.private_bytes(pem, plain, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("1")
    with pytest.raises(DataError, match=r"no model\.sig"):
        require_signature(folder, public)
    sign(folder, private)
    require_signature(folder, public)
    (folder / "weights").write_text("2")
    with pytest.raises(DataError, match="does not hold"):
        require_signature(folder, public)
