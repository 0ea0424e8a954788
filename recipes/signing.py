"""Signatures of model folders with a local key, through OpenSSF model-signing (the extra `signing`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.errors import DataError, RetortError
from recipes.lineage import SIGNATURE


def sign(folder: Path, key: Path) -> Path:
    """Sign all files of a folder with an elliptic-curve private key (PEM). Returns the signature's path.

    Raises:
        RetortError: the library is not installed, or the key cannot be used.
    """
    library, signature = _library(), folder / SIGNATURE
    try:
        config = library.signing.Config().use_elliptic_key_signer(private_key=key)
        config.set_hashing_config(_all_but(library, signature)).sign(folder, signature)
    except (OSError, ValueError, TypeError) as error:
        raise RetortError(f"cannot sign ({error})", str(key), "give an EC private key in PEM format") from None
    return signature


def require_signature(folder: Path, key: Path) -> None:
    """Refuse a folder whose files are not those that the owner of a public key (PEM) signed.

    Raises:
        DataError: there is no signature, or it does not fit. RetortError: the library is not installed.
    """
    library, signature = _library(), folder / SIGNATURE
    if not signature.is_file():
        raise DataError(f"has no {SIGNATURE}", str(folder), "get the signed folder, or leave model.public_key out")
    try:
        config = library.verifying.Config().use_elliptic_key_verifier(public_key=key)
        config.set_hashing_config(_all_but(library, signature)).verify(folder, signature)
    except Exception as error:  # the library raises what its parts raise: all mean that the signature does not hold
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"its signature does not hold ({reason})", str(folder), "get the signed folder again") from None


def _all_but(library: Any, signature: Path) -> Any:
    return library.hashing.Config().set_ignored_paths(paths=[signature])


def _library() -> Any:
    try:
        import model_signing
        from model_signing import hashing, signing, verifying  # noqa: F401
    except ImportError:
        raise RetortError("signatures need another library", "signing", "pip install 'retort[signing]'") from None
    return model_signing
