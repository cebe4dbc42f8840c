"""What our ``airflow.cfg`` names and Airflow needs before anything of its own: how a component connects to the service's database."""

from __future__ import annotations

import sys

DATABASE = {"options": "-c deadlock_timeout=1s"} if "scheduler" in sys.argv else {}
"""Arguments of ``psycopg2.connect``.

Of two transactions that wait for each other, PostgreSQL gives up the one whose patience ends first, once it has waited for so long
(all others have 5 s): the scheduler's, which tries again. A request of a user would fail.
"""
