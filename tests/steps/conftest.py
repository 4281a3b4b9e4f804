import pytest

from tests.support.tiny_models import MODELS


@pytest.fixture(scope="session", params=sorted(MODELS))
def model(request):
    """Each of the three users' models in turn."""
    return MODELS[request.param]()


@pytest.fixture(scope="session")
def plain():
    return MODELS["plain"]()
