"""Reports: tables and plots of runs, as Markdown and as one page of HTML."""
