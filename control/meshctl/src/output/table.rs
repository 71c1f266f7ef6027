//! Rows of a list, and the forms they are printed in.

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use serde_json::{Map, Value};

use super::{Format, Tint, on_stdout, say, template};
use crate::Usage;

/// A column: its heading, and its name in JSON and templates.
type Column = (&'static str, &'static str);

/// Rows under the names of their columns.
#[derive(Debug)]
pub(crate) struct Table {
    columns: &'static [Column],
    /// For JSON and templates alone.
    more: &'static [Column],
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    cells: Vec<Value>,
    labels: Option<Map<String, Value>>,
}

impl Table {
    pub(crate) fn new(columns: &'static [Column]) -> Self {
        Self { columns, more: &[], rows: Vec::new() }
    }

    /// With fields that the table itself does not show.
    pub(crate) fn with_more(columns: &'static [Column], more: &'static [Column]) -> Self {
        Self { columns, more, rows: Vec::new() }
    }

    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.values(cells.into_iter().map(Value::String).collect());
    }

    /// A row whose cells are not all texts.
    pub(crate) fn values(&mut self, cells: Vec<Value>) {
        debug_assert_eq!(cells.len(), self.columns.len() + self.more.len());
        self.rows.push(Row { cells, labels: None });
    }

    /// A row whose labels `.Label "key"` finds.
    pub(crate) fn labelled(&mut self, cells: Vec<Value>, labels: &mesh_api::Map) {
        self.values(cells);
        if let Some(row) = self.rows.last_mut() {
            row.labels = Some(labels.iter().map(|(k, v)| (k.clone(), v.as_str().into())).collect());
        }
    }

    pub(crate) fn print(&self, format: &Format) -> Result<()> {
        self.lines(format, on_stdout())?.iter().try_for_each(say)
    }

    fn lines(&self, format: &Format, colours: bool) -> Result<Vec<String>> {
        let refuse = |text: String| Usage(format!("--format: {text}"));
        let mut objects = self.rows.iter().map(|row| Value::Object(self.object(row, true)));
        match format {
            Format::Table => Ok(self.table(colours)),
            Format::Json => Ok(self
                .rows
                .iter()
                .map(|row| Value::Object(self.object(row, false)).to_string())
                .collect()),
            Format::Rows(template) => {
                template.check_fields(&self.known(), &self.listed()).map_err(refuse)?;
                let made = objects.map(|object| template.render(&object));
                made.collect::<Result<_, _>>().map_err(|err| refuse(err).into())
            }
            Format::TableOf(template) => {
                template.check_fields(&self.known(), &self.listed()).map_err(refuse)?;
                let heading = template.render_heading(&self.headings()).map_err(refuse)?;
                let mut lines = vec![split(&heading)];
                if let Err(err) = objects.try_for_each(|object| {
                    let made = template.render(&object)?;
                    lines.extend(made.split('\n').map(split));
                    Ok(())
                }) {
                    bail!(refuse(err));
                }
                Ok(aligned(&lines, |_, _, _| None))
            }
        }
    }

    fn all(&self) -> impl Iterator<Item = &Column> {
        self.columns.iter().chain(self.more)
    }

    fn object(&self, row: &Row, for_templates: bool) -> Map<String, Value> {
        let keys = self.all().map(|(_, key)| (*key).to_owned());
        let mut fields: Map<_, _> = keys.zip(row.cells.iter().cloned()).collect();
        if let (Some(labels), true) = (&row.labels, for_templates) {
            fields.insert(template::LABEL_MAP.to_owned(), Value::Object(labels.clone()));
        }
        fields
    }

    fn headings(&self) -> Value {
        let heading = |(heading, key): &Column| ((*key).to_owned(), Value::from(*heading));
        let mut headings: Map<_, _> = self.all().map(heading).collect();
        headings.insert(template::LABEL_MAP.to_owned(), Value::Object(Map::new()));
        Value::Object(headings)
    }

    fn listed(&self) -> BTreeSet<String> {
        self.all().map(|(_, key)| (*key).to_owned()).collect()
    }

    fn known(&self) -> BTreeSet<String> {
        let mut known = self.listed();
        if known.contains("Labels") {
            known.insert("Label".to_owned());
        }
        known
    }

    fn table(&self, colours: bool) -> Vec<String> {
        let texts = |cells: &[Value]| cells.iter().take(self.columns.len()).map(text).collect();
        let mut lines: Vec<Vec<String>> =
            vec![self.columns.iter().map(|(heading, _)| (*heading).to_owned()).collect()];
        lines.extend(self.rows.iter().map(|row| texts(&row.cells)));
        aligned(&lines, |line, column, cell| {
            let (_, key) = self.columns.get(column)?;
            (colours && line > 0).then(|| Tint::of_cell(key, cell)).flatten()
        })
    }
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn split(line: &str) -> Vec<String> {
    line.split('\t').map(str::to_owned).collect()
}

/// Columns as wide as their widest cell and 3 blanks, at least 10; the last is not padded.
pub(crate) fn aligned(
    lines: &[Vec<String>],
    tint: impl Fn(usize, usize, &str) -> Option<Tint>,
) -> Vec<String> {
    let width = |column: usize| {
        let cells = lines.iter().filter(|line| line.len() > column + 1);
        cells.map(|line| line[column].chars().count() + 3).max().unwrap_or(0).max(10)
    };
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let padded = |at: usize, line: &Vec<String>| {
        let mut made = String::new();
        for (column, cell) in line.iter().enumerate() {
            match tint(at, column, cell) {
                Some(tint) => made.push_str(&tint.paint(cell)),
                None => made.push_str(cell),
            }
            if column + 1 < line.len() {
                made.push_str(&" ".repeat(widths[column].saturating_sub(cell.chars().count())));
            }
        }
        made
    };
    lines.iter().enumerate().map(|(at, line)| padded(at, line)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const COLUMNS: &[Column] = &[("ID", "ID"), ("LONG NAME", "Name"), ("PORTS", "Ports")];

    fn table() -> Table {
        let mut table = Table::new(COLUMNS);
        table.row(vec!["abcdefghijkl".into(), "w".into(), String::new()]);
        table.row(vec!["x".into(), "web".into(), "*:80->80/tcp".into()]);
        table
    }

    fn lines(table: &Table, format: &str) -> Vec<String> {
        table.lines(&format.parse().unwrap(), false).unwrap()
    }

    #[test]
    fn tables_are_aligned_as_dockers() {
        let expected = [
            "ID             LONG NAME   PORTS",
            "abcdefghijkl   w           ",
            "x              web         *:80->80/tcp",
        ];
        assert_eq!(lines(&table(), "table"), expected);
        let json = lines(&table(), "json");
        assert_eq!(json[1], r#"{"ID":"x","Name":"web","Ports":"*:80->80/tcp"}"#);
        assert_eq!(lines(&Table::new(&[("NAME", "Name"), ("X", "X")]), "table"), ["NAME      X"]);
    }

    #[test]
    fn templates_make_lines_and_tables() {
        assert_eq!(lines(&table(), "{{.Name}}={{.ID}}"), ["w=abcdefghijkl", "web=x"]);
        let expected = ["LONG NAME   ID", "W           abc", "WEB         x"];
        assert_eq!(lines(&table(), r"table {{upper .Name}}\t{{truncate .ID 3}}"), expected);
        assert_eq!(lines(&Table::new(COLUMNS), "table {{.Ports}}"), ["PORTS"]);
        assert_eq!(lines(&Table::new(COLUMNS), "{{.Ports}}"), [""; 0]);
    }

    #[test]
    fn fields_that_do_not_exist_are_refused_even_without_rows() {
        let err = Table::new(COLUMNS).lines(&"{{.Nam}}".parse().unwrap(), false).unwrap_err();
        assert!(err.is::<Usage>());
        let said = "there is no field `.Nam` here; did you mean `.Name`?; there are .ID .Name \
                    .Ports";
        assert!(err.to_string().contains(said), "{err}");
    }

    #[test]
    fn more_fields_are_in_json_and_templates() {
        let mut table = Table::with_more(&[("NAME", "Name")], &[("SELF", "Self"), ("L", "Labels")]);
        let labels = mesh_api::Map::from([("a".to_owned(), "b".to_owned())]);
        table.labelled(vec![json!("m1"), json!(true), json!("a=b")], &labels);
        assert_eq!(lines(&table, "table"), ["NAME", "m1"]);
        assert_eq!(lines(&table, "json"), [r#"{"Labels":"a=b","Name":"m1","Self":true}"#]);
        let made = lines(&table, r#"{{if .Self}}*{{end}}{{.Labels}} {{.Label "a"}}"#);
        assert_eq!(made, ["*a=b b"]);
        assert_eq!(
            lines(&table, r#"table {{.Self}}\t{{.Label "a"}}"#),
            ["SELF      ", "true      b"]
        );
    }

    #[test]
    fn colours_do_not_move_columns() {
        let mut table = Table::new(&[("STATUS", "Status"), ("NAME", "Name")]);
        table.row(vec!["Down".into(), "w1".into()]);
        let lines = table.lines(&Format::Table, true).unwrap();
        assert_eq!(lines, ["STATUS    NAME", "\u{1b}[31mDown\u{1b}[0m      w1"]);
    }
}
