"""One HTML file that shows a diff to others: works offline, needs no server.

    from debug.report import write_report

    write_report(result, Path("diff.html"), drift=drifted, command="logitlock diff …")

    report.py   the page: verdict, culprits, tables          figures.py      the plots, as plotly.js reads them
    page.html, style.css, plots.js   the template            environment.py  versions and machine

plotly is imported only where a report is written.
"""

from debug.report.report import check_report, write_report

__all__ = ["check_report", "write_report"]
