"""How a component of Airflow connects to the service's database.

Our ``airflow.cfg`` names it, and Airflow imports it before anything of its own.
"""

from __future__ import annotations

import sys

ARGUMENTS = {"options": "-c deadlock_timeout=1s"} if "scheduler" in sys.argv else {}
"""Arguments of ``psycopg2.connect``.

Of two transactions that wait for each other, PostgreSQL gives up the one whose patience ends first,
once it has waited for so long (all others have 5 s): the scheduler's, which tries again. A request
of a user would fail.
"""
