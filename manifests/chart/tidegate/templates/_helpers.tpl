{{- define "tidegate.labels" -}}
app.kubernetes.io/part-of: tidegate
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "tidegate.image" -}}
image: {{ printf "%s:%s" .Values.image.repository .Values.image.tag | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end }}

{{/* Root reads a file that only root may read; it can do nothing else. */}}
{{- define "tidegate.serverAddress" -}}
- name: server-address
  {{- include "tidegate.image" . | nindent 2 }}
  command: [tidegate-server-address]
  env:
    - name: TIDEGATE_APISERVER
      valueFrom:
        configMapKeyRef: {name: tidegate-config, key: apiServer}
  securityContext:
    runAsUser: 0
    runAsNonRoot: false
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    capabilities: {drop: [ALL]}
    seccompProfile: {type: RuntimeDefault}
  volumeMounts:
    - {name: apiserver, mountPath: /run/tidegate-apiserver}
    {{- if .Values.kubeletConfig }}
    - {name: kubelet-config, mountPath: /etc/kubernetes/kubelet.conf, readOnly: true}
    {{- end }}
{{- end }}

{{- define "tidegate.serverAddressVolumes" -}}
- name: apiserver
  emptyDir: {}
{{- if .Values.kubeletConfig }}
- name: kubelet-config
  hostPath: {path: {{ .Values.kubeletConfig }}, type: File}
{{- end }}
{{- end }}
