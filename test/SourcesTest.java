import static org.assertj.core.api.Assertions.assertThat;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import java.io.IOException;
import java.net.Inet6Address;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.net.NetworkInterface;
import java.net.ServerSocket;
import java.net.ProtocolFamily;
import java.net.Socket;
import java.net.StandardProtocolFamily;
import java.nio.channels.ServerSocketChannel;
import java.nio.channels.SocketChannel;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import java.util.stream.Stream;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.ValueSource;

/**
 * net-tools, BusyBox, ss and procfs see the same of the same sockets, whatever their state: one hook for each watches
 * the sockets that the test opens and closes.
 *
 * <p>Both ends of every connection are on this machine, so each has two rows in the tables; the client's, whose remote
 * port is the watched one, must never count.
 */
@Timeout(180) // many checks of many hooks, on a machine that may be busy
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
        try (Server server = Server.start(); Watch watch = new Watch(server.port());
                Server other = Server.start()) {
            watch.sees(0);
            other.connect();
            watch.sees(0);
            Server.Connection ipv4 = server.connect("127.0.0.1"); // mapped, as the server listens on [::]
            watch.sees(ipv4);
            Server.Connection ipv6 = server.connect("::1");
            watch.sees(ipv4, ipv6);
            Server.Connection second = server.connect("::1");
            watch.sees(ipv4, ipv6, second);
            ipv4.close();
            watch.sees(ipv6, second);
            for (int connections = 3; connections <= 200; connections++) {
                server.connect();
            }
            watch.sees(200);
            server.close();
            watch.cannotTell(); // nothing listens any more
        }
    }

    @Test
    void agreeOnUnixSocketsWhileTheyComeAndGoBesideTcp() throws Exception {
        Path file = directory.resolve("b.sock");
        try (Server tcp = Server.start(); Server.OnSocket alike = new Server.OnSocket(directory.resolve("xb.sock"));
                Server.OnSocket unix = new Server.OnSocket(file);
                Watch watch = new Watch(tcp.port(), file.toString())) {
            alike.connect();
            watch.sees(0);
            SocketChannel early = unix.knock();
            watch.sees(0); // nobody has accepted it
            SocketChannel accepted = unix.accept();
            watch.sees(1);
            Server.Connection second = tcp.connect();
            watch.sees(2);
            AutoCloseable third = unix.connect();
            watch.sees(3);
            second.close();
            watch.sees(2);
            early.close();
            watch.sees(2); // buildkitd's end is still there
            accepted.close();
            watch.sees(1);
            for (int connections = 2; connections <= 100; connections++) {
                unix.connect();
            }
            watch.sees(100);
            third.close();
            watch.sees(99);
            unix.close();
            watch.cannotTell(); // nothing listens any more
        }
    }

    @Test
    void agreeOnASocketWithBlanksInItsPathOrCannotTell() throws Exception {
        Path file = Files.createDirectory(directory.resolve("my own")).resolve("b 1.sock");
        try (Server tcp = Server.start(); Server.OnSocket unix = new Server.OnSocket(file);
                AutoCloseable build = unix.connect()) {
            for (String source : List.of("netstat", "ss", "procfs", "auto")) {
                Tools.require("netstat");
                Tools.require("ss");
                try (Hook hook = Hook.start(Hook.env("CONNECTION_SOURCE", source, "BUILDKITD_SOCKET", file,
                        "BUILDKITD_PORT", tcp.port()), "--once")) { // net-tools shows a path only up to a blank
                    assertThat(hook.exitCode()).isEqualTo(source.equals("netstat") ? 1 : 0);
                    assertThat(hook.out()).isEqualTo(source.equals("netstat") ? List.of() : List.of("1"));
                }
            }
        }
    }

    @Test
    void agreeThatOnlyAnEstablishedConnectionCounts() throws IOException {
        try (Server server = Server.start(); Watch watch = new Watch(server.port())) {
            Server.Connection connection = server.connect();
            watch.sees(connection);
            connection.client().shutdownOutput(); // the server's end is in CLOSE-WAIT
            watch.sees(0);
            connection = server.connect();
            watch.sees(connection);
            connection.server().shutdownOutput(); // in FIN-WAIT-2
            watch.sees(0);
            connection = server.connect();
            watch.sees(connection);
            connection.server().close();
            connection.client().close(); // the end that was closed first, the server's, is in TIME-WAIT
            watch.sees(0);
            try (Socket client = new Socket("127.0.0.1", server.port())) { // established, though nobody accepts it
                watch.sees(client);
            }
        }
    }

    @ParameterizedTest
    @CsvSource({"INET, 127.0.0.1", "INET6, ::1"})
    void agreeWhereTheServerSpeaksOnlyOneFamily(StandardProtocolFamily family, String address)
            throws IOException {
        // A java.net.ServerSocket is an IPv6 socket whatever it is bound to, and shows up among those.
        try (ServerSocketChannel listener = ServerSocketChannel.open(family)
                .bind(new InetSocketAddress(InetAddress.getByName(address), 0));
                Watch watch = new Watch(listener.socket().getLocalPort())) {
            watch.sees(0);
            try (SocketChannel client = connect(family, listener); SocketChannel server = listener.accept()) {
                watch.sees(client.socket());
                try (SocketChannel other = connect(family, listener)) {
                    watch.sees(2);
                }
                watch.sees(1);
            }
            watch.sees(0);
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

    @Test
    void agreeThatAPortWhichIsAPartOfAnotherHasNoConnection() throws IOException {
        try (Server server = Server.start(); Server.Connection connection = server.connect();
                ServerSocket part = new ServerSocket(server.port() / 10);
                Watch watch = new Watch(part.getLocalPort())) {
            watch.sees(0);
            assertThat(connection.server().isClosed()).isFalse();
        }
    }

    private static SocketChannel connect(ProtocolFamily family, ServerSocketChannel listener) throws IOException {
        SocketChannel client = SocketChannel.open(family);
        client.connect(listener.getLocalAddress());
        return client;
    }

    /** Four hooks that watch the same port, each through another source. */
    private final class Watch implements AutoCloseable {
        private static final int CHECKS_TO_STAY = 4;
        private static final Pattern PEERS = Pattern.compile(
                "\\d+ connections? to port \\d+ from (.*?) and \\d+ to .*\\. Waited .*");

        private final Map<String, Hook> hooks = new LinkedHashMap<>();

        Watch(int port) {
            this(port, "buildkitd.sock"); // the default, which no test's server has
        }

        Watch(int port, String socket) {
            Path netTools = Tools.require("netstat");
            Path busyBox = Tools.require("busybox");
            Path ss = Tools.require("ss");
            start("net-tools", port, socket, "netstat", Map.of("netstat", netTools));
            start("BusyBox", port, socket, "netstat", Map.of("netstat", busyBox));
            start("ss", port, socket, "ss", Map.of("ss", ss));
            start("procfs", port, socket, "procfs", Map.of());
        }

        private void start(String name, int port, String socket, String source, Map<String, Path> commands) {
            Map<String, String> env = Hook.env("CONNECTION_SOURCE", source, "BUILDKITD_PORT", port,
                    "PATH", Tools.only(directory.resolve(name + port), commands), "CHECK_FREQUENCY_MS", 50,
                    "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", 3600,
                    "MAX_WAIT_SECONDS", 200, // longer than a test; none stays behind a test run that was killed
                    "DEBUG", 1, "LOG_FORMAT", "text", "LOG_PREFIX", "");
            if (!socket.equals("buildkitd.sock")) {
                env.put("BUILDKITD_SOCKET", socket); // something must listen on what is named
            }
            hooks.put(name, Hook.start(env));
        }

        /** All see these connections, name their peers, and go on to see them. */
        void sees(Server.Connection... connections) {
            sees(Stream.of(connections).map(Server.Connection::client).toArray(Socket[]::new));
        }

        /** The same of connections whose server end the test has not got. */
        void sees(Socket... clients) {
            sees(clients.length);
            if (clients.length > 0) {
                hooks.forEach((name, hook) -> assertThat(peers(hook)).as(name)
                        .containsExactlyInAnyOrder(Stream.of(clients).map(Watch::peer).toArray(String[]::new)));
            }
        }

        /** All see so many connections, and go on to see as many. None could not tell at any time. */
        void sees(int connections) {
            see(String.valueOf(connections));
            hooks.forEach((name, hook) -> assertThat(hook.checks()).as(name).doesNotContain("unknown"));
        }

        void cannotTell() {
            see("unknown");
        }

        private void see(String expected) {
            hooks.forEach((name, hook) -> Hook.waitUntil(name + " sees " + expected,
                    () -> last(hook.checks(), expected)));
            hooks.forEach((name, hook) -> {
                int seen = hook.checks().size();
                Hook.waitUntil(name + " goes on", () -> hook.checks().size() >= seen + CHECKS_TO_STAY);
                assertThat(hook.checks().subList(seen, seen + CHECKS_TO_STAY)).as(name).containsOnly(expected);
            });
        }

        private boolean last(List<String> checks, String expected) {
            return !checks.isEmpty() && checks.get(checks.size() - 1).equals(expected);
        }

        /** The peers named when the number changed last. */
        private List<String> peers(Hook hook) {
            List<String> named = new ArrayList<>();
            for (String line : hook.err()) {
                Matcher peers = PEERS.matcher(line);
                if (peers.matches()) {
                    named = List.of(peers.group(1).split(", "));
                }
            }
            return named;
        }

        private static String peer(Socket client) {
            return (client.getLocalAddress() instanceof Inet6Address ? "[::1]:" : "127.0.0.1:") + client.getLocalPort();
        }

        @Override
        public void close() {
            hooks.values().forEach(Hook::close);
        }
    }
}
