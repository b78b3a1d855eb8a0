import static org.assertj.core.api.Assertions.assertThat;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import java.io.IOException;
import java.net.*;
import java.nio.channels.*;
import java.nio.file.*;
import java.util.*;
import java.util.stream.Stream;
import org.junit.jupiter.api.*;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/**
 * net-tools, BusyBox, ss and procfs see the same of the same sockets, whatever their state: one hook for each watches
 * the sockets that the test opens and closes.
 *
 * <p>Both ends of every connection are on this machine, so each has two rows in the tables; the client's, whose remote
 * port is the watched one, must never count.
 */
class SourcesTest {

    @TempDir
    private Path directory;

    @BeforeEach
    void needsIpv6() throws IOException {
        assumeTrue(NetworkInterface.getByInetAddress(InetAddress.getByName("::1")) != null,
                "needs IPv6 on the loopback interface");
    }

    @Test
    void agreeWhileConnectionsComeAndGo() {
        try (Server server = Server.start(); Watch watch = new Watch(server.port()); Server other = Server.start()) {
            watch.sees(0);
            other.connect();
            watch.sees(0);
            Server.Connection ipv4 = server.connect("127.0.0.1"); // mapped, as the server listens on [::]
            watch.sees(ipv4.client());
            Server.Connection ipv6 = server.connect("::1");
            watch.sees(ipv4.client(), ipv6.client());
            Server.Connection second = server.connect("::1");
            watch.sees(ipv4.client(), ipv6.client(), second.client());
            ipv4.close();
            watch.sees(ipv6.client(), second.client());
            for (int connections = 3; connections <= 200; connections++) {
                server.connect();
            }
            watch.sees(200);
            server.close();
            watch.cannotTell(); // nothing listens any more
        }
    }

    @Test
    void agreeOnSocketsOfIpv4() throws IOException {
        // A java.net.ServerSocket is an IPv6 socket whatever it is bound to, and shows up among those.
        try (ServerSocketChannel listener = ServerSocketChannel.open(StandardProtocolFamily.INET)
                .bind(new InetSocketAddress("127.0.0.1", 0));
                Watch watch = new Watch(listener.socket().getLocalPort())) {
            watch.sees(0);
            try (SocketChannel client = SocketChannel.open(listener.getLocalAddress())) {
                watch.sees(client.socket()); // established, though nobody accepts it
            }
            watch.sees(0);
        }
    }

    @Test
    void agreeThatOnlyAnEstablishedConnectionCounts() throws IOException {
        try (Server server = Server.start(); Watch watch = new Watch(server.port())) {
            Server.Connection closeWait = server.connect();
            Server.Connection finWait2 = server.connect();
            Server.Connection timeWait = server.connect();
            watch.sees(closeWait.client(), finWait2.client(), timeWait.client());
            // What the server's end is in:
            closeWait.client().shutdownOutput();
            watch.sees(finWait2.client(), timeWait.client());
            finWait2.server().shutdownOutput();
            watch.sees(timeWait.client());
            timeWait.server().close(); // before the other end
            timeWait.client().close();
            watch.sees(0);
        }
    }

    @Test
    void agreeOnUnixSocketsWhileTheyComeAndGoBesideTcp() throws Exception {
        Path file = directory.resolve("b.sock");
        try (Server tcp = Server.start(); Server.OnSocket unix = new Server.OnSocket(file);
                Watch watch = new Watch(tcp.port(), file)) {
            SocketChannel client = unix.knock();
            watch.sees(0); // nobody has accepted it
            SocketChannel accepted = unix.accept();
            watch.sees(1);
            Server.Connection second = tcp.connect();
            watch.sees(2);
            unix.connect();
            watch.sees(3);
            second.close();
            watch.sees(2);
            client.close();
            watch.sees(2); // buildkitd's end is still there
            accepted.close();
            watch.sees(1);
            unix.close();
            watch.cannotTell(); // nothing listens any more
        }
    }

    @ParameterizedTest
    @ValueSource(strings = {"netstat", "ss", "procfs", "auto"})
    void agreeOnASocketWithBlanksInItsPathOrCannotTell(String source) throws Exception {
        Tools.require("netstat");
        Tools.require("ss");
        Path file = Files.createDirectory(directory.resolve("my own")).resolve("b 1.sock");
        try (Server tcp = Server.start(); Server.OnSocket unix = new Server.OnSocket(file);
                AutoCloseable build = unix.connect();
                Hook hook = Hook.start(Hook.env("CONNECTION_SOURCE", source, "BUILDKITD_SOCKET", file,
                        "BUILDKITD_PORT", tcp.port()), "--once")) {
            boolean cut = source.equals("netstat"); // net-tools shows a path only up to a blank
            assertThat(hook.exitCode()).isEqualTo(cut ? 1 : 0);
            assertThat(hook.out()).isEqualTo(cut ? List.of() : List.of("1"));
        }
    }

    @ParameterizedTest
    @ValueSource(strings = {"netstat", "ss"})
    void areAskedInALanguageThatIsKnown(String tool) {
        Tools.stub(directory.resolve(tool), "[ \"$LC_ALL\" = C ] && exec " + Tools.require(tool)
                + " \"$@\"\nexit 1\n");
        Map<String, String> settings = Hook.env("PATH", directory, "LC_ALL", "de_DE.UTF-8", "CONNECTION_SOURCE", tool);
        try (Server server = Server.start(); Server.Connection build = server.connect();
                Hook hook = Hook.start(settings, "--once", "--port=" + server.port())) {
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.out()).containsExactly("1");
        }
    }

    /** Four hooks that watch the same port, each through another source. */
    private final class Watch implements AutoCloseable {
        private static final int CHECKS_TO_STAY = 4;

        private final Map<PlacesTest.Source, Hook> hooks = new EnumMap<>(PlacesTest.Source.class);

        /** Watches the socket too, if one is given. */
        Watch(int port, Path... socket) {
            Map<PlacesTest.Source, Map<String, String>> settings = new EnumMap<>(PlacesTest.Source.class);
            for (PlacesTest.Source source : PlacesTest.Source.values()) {
                Map<String, String> env = source.environment(port, directory.resolve(source.name()));
                env.putAll(Hook.env("CHECK_FREQUENCY_MS", 50, "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", 3600,
                        "MAX_WAIT_SECONDS", 1200, // longer than a test; none stays behind a test run that was killed
                        "LOG_FORMAT", "text", "LOG_PREFIX", ""));
                Stream.of(socket).forEach(file -> env.put("BUILDKITD_SOCKET", file.toString()));
                settings.put(source, env);
            }
            settings.forEach((source, env) -> hooks.put(source, Hook.start(env))); // none where a tool is missing
        }

        /** All see the connections of these, name them as peers, and go on to see them. */
        void sees(Socket... clients) {
            sees(clients.length);
            String[] peers = Stream.of(clients).map(Watch::peer).toArray(String[]::new);
            hooks.forEach((source, hook) -> assertThat(hook.err()).as(source.name())
                    .filteredOn(line -> line.contains(" to port ")).last().asString()
                    .startsWith(clients.length + " connection").contains(peers));
        }

        /** All see so many connections, and go on to see as many. None could not tell, but for a tool's 5 s. */
        void sees(int connections) {
            see(String.valueOf(connections));
            hooks.forEach((source, hook) -> assertThat(hook.err()).as(source.name())
                    .allMatch(line -> !line.contains("Cannot tell") || line.contains("no answer in 5 s")));
        }

        void cannotTell() { see("unknown"); }

        private void see(String expected) {
            hooks.forEach((source, hook) -> Hook.waitUntil(source + " sees " + expected, () -> {
                List<String> checks = hook.checks();
                return !checks.isEmpty() && checks.get(checks.size() - 1).equals(expected);
            }));
            hooks.forEach((source, hook) -> {
                int seen = hook.checks().size();
                Hook.waitUntil(source + " goes on", () -> hook.checks().size() >= seen + CHECKS_TO_STAY);
                assertThat(hook.checks().subList(seen, seen + CHECKS_TO_STAY)).as(source.name()).containsOnly(expected);
            });
        }

        private static String peer(Socket client) {
            return (client.getLocalAddress() instanceof Inet6Address ? "[::1]:" : "127.0.0.1:") + client.getLocalPort();
        }

        @Override
        public void close() { hooks.values().forEach(Hook::close); }
    }
}
