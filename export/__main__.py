import typer

from export.cli import export
from refmodels.command import run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(export)

if __name__ == "__main__":
    run(app)
