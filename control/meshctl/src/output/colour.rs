//! Colours: on a terminal alone, and never with NO_COLOR (no-color.org).

use std::io::IsTerminal as _;

use anstyle::{AnsiColor, Style};

/// What a colour says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tint {
    /// As it should be.
    Good,
    /// On its way, or on purpose.
    Between,
    /// Not as it should be.
    Bad,
}

impl Tint {
    fn style(self) -> Style {
        match self {
            Self::Good => AnsiColor::Green.on_default(),
            Self::Between => AnsiColor::Yellow.on_default(),
            Self::Bad => AnsiColor::Red.on_default(),
        }
    }

    /// The text in this colour.
    pub(crate) fn paint(self, text: &str) -> String {
        let style = self.style();
        format!("{style}{text}{style:#}")
    }

    /// What a cell of a table says, by its column and first word.
    pub(crate) fn of_cell(key: &str, cell: &str) -> Option<Self> {
        let word = cell.split(' ').next().unwrap_or_default();
        match (key, word) {
            ("Status", "Ready") | ("CurrentState", "Running" | "Complete") => Some(Self::Good),
            ("Status" | "ManagerStatus", "Down" | "Unreachable" | "Disconnected")
            | ("CurrentState", "Failed" | "Rejected" | "Orphaned")
            | ("Error", _) => Some(Self::Bad),
            ("Status", "Unknown")
            | ("Availability", "Drain" | "Pause")
            | (
                "CurrentState",
                "New" | "Allocated" | "Pending" | "Assigned" | "Accepted" | "Preparing" | "Ready"
                | "Starting",
            ) => Some(Self::Between),
            ("Replicas", counts) => {
                let (running, wanted) = counts.split_once('/')?;
                Some(if running == wanted { Self::Good } else { Self::Between })
            }
            _ => None,
        }
        .filter(|_| !cell.is_empty())
    }
}

/// Whether standard output shows colours.
pub(crate) fn on_stdout() -> bool {
    shown(std::io::stdout().is_terminal(), |name| std::env::var(name).ok())
}

/// A text in a colour, if standard error shows them.
pub(super) fn on_stderr(tint: Tint, text: &str) -> String {
    if shown(std::io::stderr().is_terminal(), |name| std::env::var(name).ok()) {
        tint.paint(text)
    } else {
        text.to_owned()
    }
}

fn shown(terminal: bool, environment: impl Fn(&str) -> Option<String>) -> bool {
    terminal
        && environment("NO_COLOR").is_none_or(|value| value.is_empty())
        && environment("TERM").is_none_or(|term| term != "dumb")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_for_terminals_that_want_them() {
        let with = |pairs: &'static [(&str, &str)]| {
            move |name: &str| {
                pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
            }
        };
        assert!(shown(true, with(&[("TERM", "xterm")])));
        assert!(shown(true, with(&[("NO_COLOR", "")])));
        assert!(!shown(false, with(&[])));
        assert!(!shown(true, with(&[("NO_COLOR", "1")])));
        assert!(!shown(true, with(&[("TERM", "dumb")])));
    }

    #[test]
    fn cells_say_how_things_are() {
        let tint = Tint::of_cell;
        assert_eq!(tint("Status", "Ready"), Some(Tint::Good));
        assert_eq!(tint("CurrentState", "Failed 3 seconds ago"), Some(Tint::Bad));
        assert_eq!(tint("Replicas", "2/3"), Some(Tint::Between));
        assert_eq!(tint("Replicas", "3/3"), Some(Tint::Good));
        assert_eq!((tint("Name", "Ready"), tint("Error", "")), (None, None));
        assert_eq!(Tint::Good.paint("x"), "\u{1b}[32mx\u{1b}[0m");
    }
}
