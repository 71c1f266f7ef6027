//! The links of a lab: a bridge in the router's namespace as underlay switch, one veth from it to
//! each node, one from the router to the client. A port has the name of the node that it leads to.

use std::{fs::File, os::fd::AsRawFd, thread};

use anyhow::{Context, Result, anyhow};
use futures::TryStreamExt;
use nix::sched::{CloneFlags, setns};
use rtnetlink::{
    Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    new_connection,
    packet_route::link::{InfoData, InfoVeth, LinkAttribute},
};

use crate::topology::{
    Member, PREFIX, PREFIX6, ROUTER, ROUTER_OUTSIDE, ROUTER_OUTSIDE6, ROUTER6, Role, Topology,
};

/// The underlay switch, in the router's namespace.
const SWITCH: &str = "underlay";
/// A machine's own link.
pub(crate) const UPLINK: &str = "eth0";

/// Runs netlink work inside a network namespace, on a thread of its own.
fn inside<T: Send, F: Future<Output = Result<T>>>(
    netns: &File,
    work: impl FnOnce(Handle) -> F + Send,
) -> Result<T> {
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            setns(netns, CloneFlags::CLONE_NEWNET).context("enter the network namespace")?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
            runtime.block_on(async {
                let (connection, handle, _) = new_connection().context("open rtnetlink")?;
                tokio::spawn(connection);
                work(handle).await
            })
        });
        worker.join().map_err(|_| anyhow!("the netlink thread panicked"))?
    })
}

/// Makes the switch, and the router's side of everything.
pub(crate) fn set_up_router(router: &File) -> Result<()> {
    inside(router, async |handle| {
        loopback_up(&handle).await?;
        handle
            .link()
            .add(LinkBridge::new(SWITCH).build())
            .execute()
            .await
            .context("make the underlay switch")?;
        let switch = index_of(&handle, SWITCH).await?;
        add_address(&handle, switch, ROUTER.into(), PREFIX).await?;
        add_address(&handle, switch, ROUTER6.into(), PREFIX6).await
    })
}

/// Makes the link of one machine, from the router's namespace to `netns`, and addresses both ends.
pub(crate) fn connect(
    router: &File,
    member: &Member,
    netns: &File,
    topology: &Topology,
) -> Result<()> {
    let client = member.role == Role::Client;
    // Only the underlay has the lab's MTU: the world outside is an ordinary Ethernet.
    let mtu = if client { 1500 } else { topology.mtu };
    inside(router, async |handle| {
        let far_end = LinkMessageBuilder::<LinkUnspec>::new()
            .name(UPLINK)
            .address(member.mac().to_vec())
            .mtu(mtu)
            .setns_by_fd(netns.as_raw_fd())
            .build();
        let mut link = LinkVeth::new(&member.name, UPLINK)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(far_end)))
            .mtu(mtu)
            .up();
        if !client {
            link = link.controller(index_of(&handle, SWITCH).await?);
        }
        handle
            .link()
            .add(link.build())
            .execute()
            .await
            .with_context(|| format!("make the link to {}", member.name))?;
        if client {
            let port = index_of(&handle, &member.name).await?;
            add_address(&handle, port, ROUTER_OUTSIDE.into(), PREFIX).await?;
            add_address(&handle, port, ROUTER_OUTSIDE6.into(), PREFIX6).await?;
        }
        Ok(())
    })?;
    inside(netns, async |handle| set_up_end(&handle, member).await)
}

/// The machine's side: addresses and default routes.
async fn set_up_end(handle: &Handle, member: &Member) -> Result<()> {
    loopback_up(handle).await?;
    let uplink = index_of(handle, UPLINK).await?;
    set_link(handle, UPLINK, true).await?;
    add_address(handle, uplink, member.address.into(), PREFIX).await?;
    add_address(handle, uplink, member.address6.into(), PREFIX6).await?;
    let Some((gateway, gateway6)) = member.gateway() else { return Ok(()) };
    let route = RouteMessageBuilder::<std::net::Ipv4Addr>::new().gateway(gateway).build();
    handle.route().add(route).execute().await.context("add the default route")?;
    let route = RouteMessageBuilder::<std::net::Ipv6Addr>::new().gateway(gateway6).build();
    handle.route().add(route).execute().await.context("add the default route of IPv6")
}

/// Cuts or restores a node's link, at the switch: the node sees its carrier go, like a pulled
/// cable, and keeps its addresses and routes.
pub(crate) fn set_port(router: &File, node: &str, up: bool) -> Result<()> {
    inside(router, async |handle| set_link(&handle, node, up).await)
}

/// Removes a node's link, with both its ends.
pub(crate) fn remove_port(router: &File, node: &str) -> Result<()> {
    inside(router, async |handle| {
        let port = LinkUnspec::new_with_name(node).build();
        handle
            .link()
            .del_with_message(port)
            .execute()
            .await
            .with_context(|| format!("remove the link to {node}"))
    })
}

/// Removes every link of a namespace that is about to go. The kernel would do it too, but some
/// time after the last process; what hangs on the links (programs, peers) would seem left over.
pub(crate) fn remove_links(netns: &File) -> Result<()> {
    inside(netns, async |handle| {
        let mut links = handle.link().get().execute();
        let mut indices = Vec::new();
        while let Some(link) = links.try_next().await.context("list links")? {
            indices.push(link.header.index);
        }
        for index in indices {
            // One end of a pair takes the other along, and some (lo, sit0) cannot go: no matter.
            let _ = handle.link().del(index).execute().await;
        }
        Ok(())
    })
}

async fn loopback_up(handle: &Handle) -> Result<()> {
    set_link(handle, "lo", true).await
}

async fn set_link(handle: &Handle, name: &str, up: bool) -> Result<()> {
    let link = LinkUnspec::new_with_name(name);
    let link = if up { link.up() } else { link.down() };
    let state = if up { "up" } else { "down" };
    handle
        .link()
        .set(link.build())
        .execute()
        .await
        .with_context(|| format!("set link {name} {state}"))
}

async fn index_of(handle: &Handle, name: &str) -> Result<u32> {
    let mut found = handle.link().get().match_name(name.to_owned()).execute();
    let link = found.try_next().await.with_context(|| format!("find link {name}"))?;
    Ok(link.with_context(|| format!("there is no link {name}"))?.header.index)
}

async fn add_address(
    handle: &Handle,
    link: u32,
    address: std::net::IpAddr,
    prefix: u8,
) -> Result<()> {
    let request = handle.address().add(link, address, prefix);
    request.execute().await.with_context(|| format!("add address {address}/{prefix}"))
}

/// Whether the kernel can make every kind of link that a lab and its nodes need; tried in a
/// namespace that ends with the thread.
pub(crate) fn probe_links() -> Vec<String> {
    let probe = || -> Result<Vec<String>> {
        nix::sched::unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace")?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        runtime.block_on(async {
            let (connection, handle, _) = new_connection().context("open rtnetlink")?;
            tokio::spawn(connection);
            let mut missing = Vec::new();
            let vxlan = rtnetlink::LinkVxlan::new("vxlan0", 1).build();
            let kinds = [
                ("veth", LinkVeth::new("veth0", "veth1").build()),
                ("bridge", LinkBridge::new("bridge0").build()),
                ("vxlan", vxlan),
            ];
            for (kind, link) in kinds {
                debug_assert!(
                    link.attributes.iter().any(|a| matches!(a, LinkAttribute::IfName(_)))
                );
                if let Err(e) = handle.link().add(link).execute().await {
                    missing.push(format!("links of kind {kind} ({e}); try: modprobe {kind}"));
                }
            }
            Ok(missing)
        })
    };
    match thread::spawn(probe).join() {
        Ok(Ok(missing)) => missing,
        Ok(Err(e)) => vec![format!("network namespaces ({e:#})")],
        Err(_) => vec!["network namespaces (the probe panicked)".to_owned()],
    }
}
