//! The TCP port: one line of JSON, then everything comes back.

use std::io;

use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
};

use super::Shared;

pub(super) async fn serve(listener: TcpListener, mut shared: Shared) {
    loop {
        let (stream, shared_by_conn) = tokio::select! {
            // Whoever has connected already is served before the end.
            biased;
            accepted = accept(&listener) => (accepted, shared.clone()),
            () = shared.stop_asked() => return,
        };
        tokio::spawn(async move {
            // Whoever hangs up has its answer or does not want it.
            let _ = echo(stream, shared_by_conn).await;
        });
    }
}

/// The next connection. Out of descriptors it waits rather than spins.
pub(super) async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let _ = stream.set_nodelay(true);
                return stream;
            }
            Err(error) => {
                let exhausted =
                    matches!(error.raw_os_error(), Some(nix::libc::EMFILE | nix::libc::ENFILE));
                if exhausted {
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
            }
        }
    }
}

async fn echo(mut stream: TcpStream, mut shared: Shared) -> io::Result<()> {
    let answer = shared.identity.answer(stream.peer_addr()?, stream.local_addr()?, "tcp");
    stream.write_all(&answer).await?;
    let (mut reader, mut writer) = stream.split();
    tokio::select! {
        copied = tokio::io::copy(&mut reader, &mut writer) => {
            copied?;
        }
        () = shared.stop_asked() => {}
    }
    writer.shutdown().await
}
