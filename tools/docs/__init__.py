"""What MkDocs calls while it builds the site (mkdocs.yml): generated pages, links out of docs/."""
