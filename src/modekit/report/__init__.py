"""`modekit report`: one page that shows what a mixture is and is worth.

result_files.py     what lies in OUT/results and belongs to this checkpoint
routing.py          the part of it that `modekit inspect` wrote, within a page's room
content.py          everything the page shows, as plain data: report.json
page.py             the page, from the data alone; its sections lie in sections/
drawing.py          the pictures, in the page and as SVG files for papers
write.py            all of it to disk
"""
