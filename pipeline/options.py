"""Options that several commands take, in the same words.

Layer 6: imports click only.
"""

from __future__ import annotations

import click

store_option = click.option(
    "--store",
    "url",
    envvar="NEURON_CENSUS_STORE",
    default="./census",
    show_default=True,
    show_envvar=True,
    metavar="URL",
    help="Directory, or s3://bucket/prefix.",
)
jobs_help = "Dashboard of a Ray cluster: http://HOST:8265."
jobs_option = click.option(
    "--ray",
    "address",
    envvar="RAY_API_SERVER_ADDRESS",
    required=True,
    show_envvar=True,
    metavar="http://HOST:8265",
    help=jobs_help,
)
# which of a run's jobs: nothing is opened, so there is no default
into_option = click.option("--store", "url", metavar="URL", help="The store that it was submitted into, if several.")
