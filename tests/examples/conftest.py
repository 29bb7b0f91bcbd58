"""The controller of the controller's own tests."""

from tests.controller.conftest import catalog, start_controller

__all__ = ["catalog", "start_controller"]
