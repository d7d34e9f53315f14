from tests.conformance.conftest import one_thread as one_thread
