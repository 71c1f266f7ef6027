//! Our nft table, through the `nft` program.
//!
//! `nft` prints a table in its own words, which differ between versions. So a table is taken for
//! unchanged if it is printed as it was right after we set it; and it is only printed at all when
//! the namespace's ruleset generation moved (`NFT_MSG_GETGEN`), which every change does.

use std::{
    io::{self, Write},
    process::{Command, Output, Stdio},
};

use mesh_dataplane::{Value, nft::TABLE};

use crate::{
    error::OpError,
    netlink::{Request, Socket, attrs},
};

const GETGEN: u16 = 10 << 8 | 16;
const NFTA_GEN_ID: u16 = 1;

#[derive(Debug)]
pub(crate) struct Nft {
    socket: Socket,
    /// The body that we set last, and how `nft` printed it.
    set: Option<(String, String)>,
    /// The generation at which the table was last seen as we set it.
    good_at: Option<u32>,
}

impl Nft {
    /// For the namespace of the calling thread.
    pub(crate) fn open() -> io::Result<Self> {
        Ok(Self { socket: Socket::open(libc::NETLINK_NETFILTER)?, set: None, good_at: None })
    }

    fn generation(&mut self) -> Option<u32> {
        let reply = self.socket.get(Request::new(GETGEN, 0, &[0; 4])).ok()??;
        let (_, id) = attrs(reply.body.get(4..)?).find(|(kind, _)| *kind == NFTA_GEN_ID)?;
        Some(u32::from_be_bytes(id.try_into().ok()?))
    }

    /// The table as it is: what we set, or empty if someone changed it, or nothing.
    pub(crate) fn observe(&mut self) -> Result<Option<Value>, OpError> {
        let generation = self.generation();
        if let (Some((body, _)), Some(now)) = (&self.set, generation)
            && self.good_at == Some(now)
        {
            return Ok(Some(Value::Nft(body.clone())));
        }
        self.good_at = None;
        let Some(listing) = self.list()? else { return Ok(None) };
        match &self.set {
            Some((body, printed)) if *printed == listing => {
                self.good_at = generation;
                Ok(Some(Value::Nft(body.clone())))
            }
            _ => Ok(Some(Value::Nft(String::new()))),
        }
    }

    fn list(&self) -> Result<Option<String>, OpError> {
        let output = Command::new("nft").args(["list", "table", TABLE.0, TABLE.1]).output()?;
        if output.status.success() {
            return Ok(Some(String::from_utf8_lossy(&output.stdout).into_owned()));
        }
        if complaint(&output).contains("No such file or directory") {
            return Ok(None);
        }
        Err(OpError::Nft(complaint(&output)))
    }

    /// Replaces the table in one transaction; without a body removes it.
    pub(crate) fn set(&mut self, body: Option<&str>) -> Result<(), OpError> {
        let (family, name) = TABLE;
        // Declaring it first makes the deletion good whether or not it is there.
        let mut script = format!("table {family} {name}\ndelete table {family} {name}\n");
        if let Some(body) = body {
            script += &format!("table {family} {name} {{\n{body}}}\n");
        }
        self.good_at = None;
        self.set = None;
        run(&script)?;
        if let Some(body) = body {
            let generation = self.generation();
            if let Some(listing) = self.list()? {
                self.set = Some((body.to_owned(), listing));
                self.good_at = generation;
            }
        }
        Ok(())
    }
}

/// Feeds a script to `nft` in the calling thread's namespace.
pub(crate) fn run(script: &str) -> Result<(), OpError> {
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(script.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if output.status.success() { Ok(()) } else { Err(OpError::Nft(complaint(&output))) }
}

fn complaint(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).trim().to_owned()
}
