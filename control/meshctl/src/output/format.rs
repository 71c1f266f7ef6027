//! The flags of listings.

use std::{fmt::Write as _, str::FromStr};

use anyhow::{Result, bail};
use clap::Args;

use super::template::Template;
use crate::{Usage, client, unknown::did_you_mean};

/// How lists are printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Format {
    /// An aligned table.
    Table,
    /// One JSON object per line.
    Json,
    /// An aligned table of what a template makes of the headings and of each row.
    TableOf(Template),
    /// What a template makes of each row.
    Rows(Template),
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.is_empty() || text == "table" {
            return Ok(Self::Table);
        }
        if text == "json" {
            return Ok(Self::Json);
        }
        if let Some(template) = text.strip_prefix("table ") {
            return template.trim_start().parse().map(Self::TableOf);
        }
        if text.contains("{{") {
            return text.parse().map(Self::Rows);
        }
        Err("use table, json, a Go template like '{{.ID}}', or 'table {{.ID}}\\t{{.Name}}'"
            .to_owned())
    }
}

/// The flags of every listing.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Only what matches KEY=VALUE (may be repeated)
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub(crate) filter: Vec<String>,
    /// `table`, `json` (an object per line), a Go template per line, or `table TEMPLATE`
    #[arg(long, default_value = "table", hide_default_value = true, value_name = "FORMAT")]
    pub(crate) format: Format,
    /// Print ids and errors whole
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// Print ids alone
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

impl ListArgs {
    /// The query of the filters, of which only those in `keys` exist.
    pub(crate) fn query(&self, keys: &[&str], of: impl Iterator<Item = String>) -> Result<String> {
        for filter in &self.filter {
            let Some((key, _)) = filter.split_once('=') else {
                bail!(Usage(format!(
                    "invalid argument \"{filter}\" for --filter: use key=value, where key is one \
                     of {}",
                    keys.join(", ")
                )));
            };
            if !keys.contains(&key.trim()) {
                let hint = did_you_mean(key.trim(), keys.iter().copied(), "");
                bail!(Usage(format!(
                    "there is no filter `{}` here{hint}; there are {}",
                    key.trim(),
                    keys.join(", ")
                )));
            }
        }
        client::filter_query(&self.filter.iter().cloned().chain(of).collect::<Vec<_>>())
    }

    /// Whether ids alone are printed: a format that was asked for comes first, as in the stock CLI.
    pub(crate) fn ids_alone(&self) -> bool {
        self.quiet && self.format == Format::Table
    }
}

/// The text under `--help` of a listing: what can be filtered by and formatted.
pub(crate) fn fields(keys: &[&str], columns: &[&[(&str, &str)]]) -> String {
    let mut text = String::new();
    if !keys.is_empty() {
        let _ = writeln!(text, "Filters: {}", keys.join(", "));
    }
    let names: Vec<_> =
        columns.iter().flat_map(|some| some.iter()).map(|(_, key)| format!(".{key}")).collect();
    let _ = write!(text, "Fields of templates: {}", names.join(" "));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_dockers() {
        let parsed = |text: &str| text.parse::<Format>();
        assert_eq!(parsed("table"), Ok(Format::Table));
        assert_eq!(parsed(" json "), Ok(Format::Json));
        let template: Template = "{{.ID}}".parse().unwrap();
        assert_eq!(parsed("{{.ID}}"), Ok(Format::Rows(template.clone())));
        assert_eq!(parsed("table  {{.ID}}"), Ok(Format::TableOf(template)));
        for bad in ["yaml", "table {{.ID", "{{bogus}}", "raw"] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
        assert!(parsed("yaml").unwrap_err().contains("{{.ID}}"));
    }

    #[test]
    fn unknown_filters_are_refused_with_those_known() {
        let args = |filter: &str| ListArgs {
            filter: vec![filter.to_owned()],
            format: Format::Table,
            no_trunc: false,
            quiet: false,
        };
        let query = |filter| args(filter).query(&["id", "label"], std::iter::empty());
        assert!(query("label=a=b").unwrap().starts_with("filters="));
        for (filter, said) in [
            ("lable=x", "no filter `lable` here; did you mean `label`?; there are id, label"),
            ("label", "use key=value, where key is one of id, label"),
        ] {
            let err = query(filter).unwrap_err();
            assert!(err.is::<Usage>() && err.to_string().contains(said), "{err}");
        }
        let both = args("id=x").query(&["id"], std::iter::once("node=y".to_owned())).unwrap();
        assert!(both.contains("node") && both.contains("id"), "{both}");
    }
}
