"""How certificates and results appear in a notebook, and as pandas tables. Neither torch nor pandas is needed to import it."""

from patchcert_cli.notebook.tables import Tabular as Tabular
