"""What the address of a server adds to the model that a recipe names: whose terms bind whoever sends requests there."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from urllib.parse import urlsplit

from recipes.evidence import Asset, Doubt, bare_model, clean, model_asset, served_name, service_asset
from recipes.facts import facts
from recipes.names import HUB_ID, family_called, host_at, host_of_model

# Names that no public server has: special-use ones and those of networks of one's own (RFC 2606, 6761, 6762, 8375).
OWN_NAMES = re.compile(
    r"[^.]+|.+\.(?:local|localhost|localdomain|internal|intranet|lan|corp|home|private|test|home\.arpa)"
)


def endpoint_assets(model: Asset, urls: Iterable[str], served_as: str | None) -> Iterator[Asset]:
    """The services at the addresses, and the model that they are asked for where its name is that of another one.

    A server of one's own adds nothing to the model that it serves. What a public server of nobody known gives out is
    for a person to decide.
    """
    asked_for = served_as or served_name(model.name)
    for address in dict.fromkeys((urlsplit(url).hostname or "").casefold().rstrip(".") for url in urls):
        host = host_at(address)
        if host is not None and _is_that_service(model, host.names):
            continue
        if host is not None:
            yield service_asset(host, f"{host.names[0]}:{asked_for}", model.role)
        elif not is_own(address):
            yield _unknown_server(address, model)
    if served_as is not None and (other := _other_model(served_as, model)) is not None:
        yield other


def is_own(address: str) -> bool:
    """Whether a host name or address is in a network of one's own: this machine, a private range, an internal name."""
    try:
        number = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return OWN_NAMES.fullmatch(address) is not None and address != ""
    return number.is_private or number.is_loopback or number.is_link_local


def _is_that_service(model: Asset, names: tuple[str, ...]) -> bool:
    """Whether the model is named as that service's already, and was judged under its terms."""
    return model.kind == "service" and re.split(r"[:/]", model.name)[0].casefold() in names


def _unknown_server(address: str, model: Asset) -> Asset:
    says = f"nobody has written down whose server this is and under which terms it serves {model.name}"
    remedy = f"attest to '{address}' where it is yours or its terms allow it; a service has a name: retort licenses"
    doubt = Doubt("review", says, "the address", remedy, unknown=True)
    return Asset(address, model.role, "service", doubts=(doubt,))


def _other_model(name: str, model: Asset) -> Asset | None:
    """The model that a server's name for it means, where the facts know it and it brings terms that the model has not.

    Most servers call a model as they like; such a name says nothing.
    """
    plain = clean(name)[0]
    if HUB_ID.fullmatch(plain) and facts().model(plain.partition("@")[0]) is not None:
        named = model_asset(plain, model.role)
    elif host_of_model(plain.rpartition("/")[2]) is not None or family_called(plain.rpartition("/")[2]) is not None:
        named = bare_model(plain.rpartition("/")[2], model.role)
    else:
        return None
    return named if _terms(named) - _terms(model) else None


def _terms(asset: Asset) -> set[str]:
    return {claim.licence for node, _ in asset.walk() for claim in node.claims if claim.licence}
