"""One HTML file that shows a diff to others: works offline, needs no server.

    from debug.report import write_report

    write_report(result, Path("diff.html"), drift=drifted, command="logitlock diff …")

    report.py    the page as a whole                  figures.py      the plots, as plotly.js reads them
    sections.py  verdict, culprits, tables, …         environment.py  versions and machine
    markup.py    pieces of HTML                       page.html, style.css, plots.js   the template

plotly is imported only when a report is written.
"""

from debug.report.report import check_report, write_report

__all__ = ["check_report", "write_report"]
