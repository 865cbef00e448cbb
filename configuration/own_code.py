"""Whether a mixture runs on this package's code and on Transformers' alone, as what is saved with its code has to."""

from transformers import CONFIG_MAPPING

from st_moe.configuration.routers import ROUTER_TYPES


def check_own_code(router_type: str, dense_model_type: str) -> None:
    """See that a mixture needs no code beside this package's and Transformers'.

    Raises:
        ValueError: when its router or its dense family was registered from elsewhere.
    """
    places = {
        "router_type": (router_type, ROUTER_TYPES[router_type].path, "st_moe."),
        "dense_model_type": (dense_model_type, CONFIG_MAPPING[dense_model_type].__module__, "transformers."),
    }
    for name, (value, place, home) in places.items():
        if not place.startswith(home):
            raise ValueError(
                f"{name}: must be one of {home[:-1]}'s own to bundle code, got {value!r} from {place}, which a bundle "
                "would lack; set bundle_code=False"
            )
